// Where every element of a matrix fragment lies, against tables written down from the PTX ISA's figures, not from the
// emulated device. The same cases run on a GPU.
//
// Sections of the ISA: "Matrix Fragments for mma.m16n8k16", "ldmatrix", "stmatrix", "Register Fragments for
// wgmma.mma_async.m64nNk16", "Swizzling Modes".
#include "harness.h"

using namespace mmpo::test;

namespace {

// A place in a matrix, and the fragment table of an instruction: `table[lane][element]`.
struct Place {
    int row, column;
};

// A of m16n8k16: registers a0..a7 of lane `l`, two to a 32-bit register.
Place mma_a(int lane, int element) {
    static const int kRow[8] = {0, 0, 8, 8, 0, 0, 8, 8};
    static const int kColumn[8] = {0, 1, 0, 1, 8, 9, 8, 9};
    return {lane / 4 + kRow[element], lane % 4 * 2 + kColumn[element]};
}
// B of m16n8k16, rows along k: b0..b3.
Place mma_b(int lane, int element) {
    static const int kRow[4] = {0, 1, 8, 9};
    return {lane % 4 * 2 + kRow[element], lane / 4};
}
// C and D of m16n8k16: c0..c3.
Place mma_d(int lane, int element) {
    static const int kRow[4] = {0, 0, 8, 8};
    static const int kColumn[4] = {0, 1, 0, 1};
    return {lane / 4 + kRow[element], lane % 4 * 2 + kColumn[element]};
}
// D of wgmma m64nNk16: thread of the warpgroup, d0..d(N/2-1).
Place wgmma_d(int thread, int element) {
    const int warp = thread / 32, lane = thread % 32;
    return {warp * 16 + lane / 4 + (element % 4 >= 2 ? 8 : 0), element / 4 * 8 + lane % 4 * 2 + element % 2};
}

float number(int i) { return float(i * 7 % 17 - 8); }

std::string different(const char* what, int thread, int element, double found, double expected) {
    char text[160];
    snprintf(text, sizeof text, "%s: thread %d, element %d is %g, not %g", what, thread, element, found, expected);
    return text;
}

// ------------------------------------------------------------------------------------------------------------ mma.sync

__global__ void mma_kernel(float* d, const uint32_t* a, const uint32_t* b) {
    const int lane = int(threadIdx.x);
    float sums[4];
    uint32_t left[4], right[2];
    for (int i = 0; i < 4; ++i) {
        sums[i] = d[lane * 4 + i];
        left[i] = a[lane * 4 + i];
    }
    for (int i = 0; i < 2; ++i) right[i] = b[lane * 2 + i];
    mma_m16n8k16(sums, left, right);
    for (int i = 0; i < 4; ++i) d[lane * 4 + i] = sums[i];
}

CASE(mma_m16n8k16) {
    float a[16][16], b[16][8], c[16][8];
    for (int i = 0; i < 256; ++i) a[i / 16][i % 16] = number(i);
    for (int i = 0; i < 128; ++i) b[i / 8][i % 8] = number(3 * i + 1);
    for (int i = 0; i < 128; ++i) c[i / 8][i % 8] = float(1000 * i);
    std::vector<uint32_t> a_registers(128), b_registers(64);
    std::vector<float> d(128);
    for (int lane = 0; lane < 32; ++lane) {
        for (int e = 0; e < 8; ++e) {
            const Place at = mma_a(lane, e);
            a_registers[size_t(lane * 4 + e / 2)] |= uint32_t(to_bf16(a[at.row][at.column]).bits) << (e % 2 * 16);
        }
        for (int e = 0; e < 4; ++e) {
            const Place at = mma_b(lane, e);
            b_registers[size_t(lane * 2 + e / 2)] |= uint32_t(to_bf16(b[at.row][at.column]).bits) << (e % 2 * 16);
            d[size_t(lane * 4 + e)] = c[mma_d(lane, e).row][mma_d(lane, e).column];
        }
    }
    DeviceArray<uint32_t> left(a_registers), right(b_registers);
    DeviceArray<float> sums(d);
    if (const int error = LAUNCH(mma_kernel, dim3(1), dim3(32), 0, nullptr, sums.data(), left.data(), right.data())) return device_error(error);
    const std::vector<float> found = sums.download();
    for (int lane = 0; lane < 32; ++lane) {
        for (int e = 0; e < 4; ++e) {
            const Place at = mma_d(lane, e);
            float expected = c[at.row][at.column];
            for (int k = 0; k < 16; ++k) expected += a[at.row][k] * b[k][at.column];
            if (!(found[size_t(lane * 4 + e)] == expected)) return different("mma", lane, e, found[size_t(lane * 4 + e)], expected);
        }
    }
    return "";
}

// -------------------------------------------------------------------------------------------------- ldmatrix, stmatrix

// Row i of the tile stands at 16-byte chunk `place[i]`, so that the rows' addresses matter.
constexpr int kMatrixRows = 32;
int scrambled(int row) { return row * 5 % kMatrixRows; }

template <int kCount, bool kTransposed>
__global__ void ldmatrix_kernel(uint32_t* out, const uint4* tile, const int* place) {
    DYNAMIC_SHARED(raw);
    reinterpret_cast<uint4*>(raw)[place[threadIdx.x]] = tile[threadIdx.x];
    __syncwarp();
    const uint32_t row = shared_address(raw) + uint32_t(place[threadIdx.x % (8 * kCount)]) * 16;
    uint32_t r[kCount];
    if constexpr (kCount == 4 && kTransposed) ldmatrix_x4_trans(r, row);
    if constexpr (kCount == 4 && !kTransposed) ldmatrix_x4(r, row);
    if constexpr (kCount == 2 && kTransposed) ldmatrix_x2_trans(r, row);
    if constexpr (kCount == 2 && !kTransposed) ldmatrix_x2(r, row);
    for (int i = 0; i < kCount; ++i) out[threadIdx.x * kCount + i] = r[i];
}

template <int kCount, bool kTransposed>
__global__ void stmatrix_kernel(uint4* tile, const uint32_t* registers, const int* place) {
#if MMPO_SM90
    DYNAMIC_SHARED(raw);
    const uint32_t row = shared_address(raw) + uint32_t(place[threadIdx.x % (8 * kCount)]) * 16;
    uint32_t r[kCount];
    for (int i = 0; i < kCount; ++i) r[i] = registers[threadIdx.x * kCount + i];
    if constexpr (kCount == 4 && kTransposed) stmatrix_x4_trans(row, r);
    if constexpr (kCount == 4 && !kTransposed) stmatrix_x4(row, r);
    if constexpr (kCount == 2 && kTransposed) stmatrix_x2_trans(row, r);
    if constexpr (kCount == 2 && !kTransposed) stmatrix_x2(row, r);
    __syncwarp();
    if (threadIdx.x < 8 * kCount) tile[threadIdx.x] = reinterpret_cast<const uint4*>(raw)[place[threadIdx.x]];
#endif
}

// The figure of ldmatrix: lane l receives from matrix j the elements (l/4, 2(l%4)) and (l/4, 2(l%4)+1); with .trans the
// matrix is loaded in column-major order, so row and column change places.
uint32_t matrix_register(const std::vector<uint16_t>& tile, int lane, int matrix, bool transposed) {
    const int major = lane / 4, minor = lane % 4 * 2;
    const auto element = [&](int row, int column) { return uint32_t(tile[size_t((8 * matrix + row) * 8 + column)]); };
    if (transposed) return element(minor, major) | element(minor + 1, major) << 16;
    return element(major, minor) | element(major, minor + 1) << 16;
}

template <int kCount, bool kTransposed>
std::string check_ldmatrix(bool store) {
    std::vector<uint16_t> tile(kMatrixRows * 8);
    for (size_t i = 0; i < tile.size(); ++i) tile[i] = uint16_t(i * 257 + 11);
    std::vector<int> place(kMatrixRows);
    for (int i = 0; i < kMatrixRows; ++i) place[size_t(i)] = scrambled(i);
    std::vector<uint32_t> registers(32 * kCount);
    for (int lane = 0; lane < 32; ++lane) {
        for (int j = 0; j < kCount; ++j) registers[size_t(lane * kCount + j)] = matrix_register(tile, lane, j, kTransposed);
    }
    DeviceArray<int> places(place);
    std::vector<uint4> rows(kMatrixRows);
    memcpy(rows.data(), tile.data(), tile.size() * 2);
    if (store) {
        DeviceArray<uint32_t> in(registers);
        DeviceArray<uint4> out(8 * kCount);
        const int error = LAUNCH((stmatrix_kernel<kCount, kTransposed>), dim3(1), dim3(32), 512, nullptr, out.data(), in.data(), places.data());
        if (error != 0) return device_error(error);
        const std::vector<uint4> found = out.download();
        return memcmp(found.data(), rows.data(), size_t(8 * kCount) * 16) == 0 ? "" : "stmatrix stores other elements than the table says";
    }
    DeviceArray<uint4> in(rows);
    DeviceArray<uint32_t> out(registers.size());
    const int error = LAUNCH((ldmatrix_kernel<kCount, kTransposed>), dim3(1), dim3(32), 512, nullptr, out.data(), in.data(), places.data());
    return outcome(error, out, registers);
}

CASE(ldmatrix_x4) { return check_ldmatrix<4, false>(false); }
CASE(ldmatrix_x4_trans) { return check_ldmatrix<4, true>(false); }
CASE(ldmatrix_x2) { return check_ldmatrix<2, false>(false); }
CASE(ldmatrix_x2_trans) { return check_ldmatrix<2, true>(false); }
CASE(stmatrix_x4) { return check_ldmatrix<4, false>(true); }
CASE(stmatrix_x4_trans) { return check_ldmatrix<4, true>(true); }
CASE(stmatrix_x2) { return check_ldmatrix<2, false>(true); }
CASE(stmatrix_x2_trans) { return check_ldmatrix<2, true>(true); }

// --------------------------------------------------------------------------------------------------------------- wgmma

// K is 16 in every case: one instruction. Operands lie in shared memory without swizzling, as 8x8 cores of 128 bytes:
// K-major cores are 8 rows of 8 k; of a transposed operand they are 8 k of 8 rows.
uint32_t core_offset(int row, int k, bool transposed, int rows) {
    const int core = row / 8 + k / 8 * (rows / 8);
    return uint32_t(core * 128 + (transposed ? k % 8 * 16 + row % 8 * 2 : row % 8 * 16 + k % 8 * 2));
}

template <int N, bool kTransposedA, bool kTransposedB, bool kRegisters>
__global__ void wgmma_layout_kernel(float* out, const uint16_t* image, int a_bytes, int b_bytes, const uint32_t* a_registers) {
#if MMPO_SM90
    DYNAMIC_SHARED(raw);
    for (int i = int(threadIdx.x); i < (a_bytes + b_bytes) / 2; i += 128) reinterpret_cast<uint16_t*>(raw)[i] = image[i];
    fence_proxy_async();
    __syncthreads();
    const uint32_t a_tile = shared_address(raw), b_tile = a_tile + uint32_t(a_bytes);
    // Cores that follow one another along M or N are 128 bytes apart, along K as many as there are.
    const uint64_t a = wgmma_descriptor(a_tile, 64 / 8 * 128, 128, Swizzle::none);
    const uint64_t b = wgmma_descriptor(b_tile, N / 8 * 128, 128, Swizzle::none);
    float d[N / 2];
    for (int i = 0; i < N / 2; ++i) d[i] = 1.0f;
    uint32_t r[4];
    for (int i = 0; i < 4; ++i) r[i] = kRegisters ? a_registers[threadIdx.x * 4 + i] : 0u;
    pin_registers(d);
    wgmma_fence();
    if constexpr (kRegisters) wgmma_rs<N, kTransposedB>(d, r, b, true);
    else wgmma_ss<N, kTransposedA, kTransposedB>(d, a, b, true);
    wgmma_commit();
    wgmma_wait<0>();
    pin_registers(d);
    for (int i = 0; i < N / 2; ++i) out[threadIdx.x * (N / 2) + i] = d[i];
#endif
}

template <int N, bool kTransposedA, bool kTransposedB, bool kRegisters>
std::string check_wgmma() {
    constexpr int kABytes = 64 * 16 * 2, kBBytes = N * 16 * 2;
    float a[64][16], b[N][16];
    std::vector<uint16_t> image((kABytes + kBBytes) / 2);
    std::vector<uint32_t> registers(128 * 4);
    for (int i = 0; i < 64 * 16; ++i) {
        a[i / 16][i % 16] = number(i);
        image[core_offset(i / 16, i % 16, kTransposedA, 64) / 2] = to_bf16(number(i)).bits;
    }
    for (int i = 0; i < N * 16; ++i) {
        b[i / 16][i % 16] = number(5 * i + 2);
        image[kABytes / 2 + core_offset(i / 16, i % 16, kTransposedB, N) / 2] = to_bf16(number(5 * i + 2)).bits;
    }
    for (int thread = 0; thread < 128; ++thread) {
        for (int e = 0; e < 8; ++e) {
            const Place at = mma_a(thread % 32, e);
            registers[size_t(thread * 4 + e / 2)] |= uint32_t(to_bf16(a[thread / 32 * 16 + at.row][at.column]).bits) << (e % 2 * 16);
        }
    }
    DeviceArray<uint16_t> in(image);
    DeviceArray<uint32_t> a_registers(registers);
    DeviceArray<float> out(128 * N / 2);
    const int error = LAUNCH((wgmma_layout_kernel<N, kTransposedA, kTransposedB, kRegisters>), dim3(1), dim3(128), kABytes + kBBytes, nullptr,
                             out.data(), in.data(), kABytes, kBBytes, a_registers.data());
    if (error != 0) return device_error(error);
    const std::vector<float> found = out.download();
    for (int thread = 0; thread < 128; ++thread) {
        for (int e = 0; e < N / 2; ++e) {
            const Place at = wgmma_d(thread, e);
            float expected = 1.0f;
            for (int k = 0; k < 16; ++k) expected += a[at.row][k] * b[at.column][k];
            const float value = found[size_t(thread * (N / 2) + e)];
            if (!(value == expected)) return different("wgmma", thread, e, value, expected);
        }
    }
    return "";
}

CASE(wgmma_64) { return check_wgmma<64, false, false, false>(); }
CASE(wgmma_64_transposed_a) { return check_wgmma<64, true, false, false>(); }
CASE(wgmma_64_transposed_b) { return check_wgmma<64, false, true, false>(); }
CASE(wgmma_64_registers) { return check_wgmma<64, false, false, true>(); }
CASE(wgmma_96) { return check_wgmma<96, false, false, false>(); }
CASE(wgmma_128) { return check_wgmma<128, false, true, false>(); }
CASE(wgmma_128_registers) { return check_wgmma<128, false, true, true>(); }
CASE(wgmma_192) { return check_wgmma<192, true, true, false>(); }
CASE(wgmma_256) { return check_wgmma<256, false, false, false>(); }
CASE(wgmma_256_registers) { return check_wgmma<256, false, false, true>(); }

}  // namespace
