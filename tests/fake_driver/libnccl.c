/* As much of NCCL as `mmpo-fast doctor` asks: its version. */
int ncclGetVersion(int *version) {
    *version = 22705;
    return 0;
}
