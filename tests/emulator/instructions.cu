// The wrappers of ptx.cuh that no other case uses, each once: so that all of them run here, and compile under nvcc.
#include "harness.h"

using namespace mmpo::test;

namespace {

__global__ void vector_access_kernel(float* out, const float* in) {
    DYNAMIC_SHARED(raw);
    const uint32_t shared = shared_address(raw) + threadIdx.x * 16;
    store_shared_128(shared, load_128_streaming(in + threadIdx.x * 4));
    const uint4 values = load_shared_128(shared);
    if (threadIdx.x < 16) store_128_streaming(out + threadIdx.x * 4, values);
    else store_128(out + threadIdx.x * 4, load_128(in + threadIdx.x * 4));
    __syncwarp();
    store_shared_32(shared, __float_as_uint(7.0f));
    if (threadIdx.x == 0) out[0] = __uint_as_float(load_shared_128(shared).x);
}

CASE(vector_accesses) {
    DeviceArray<float> in(iota(128)), out(128);
    std::vector<float> expected = iota(128);
    expected[0] = 7.0f;
    return outcome(LAUNCH(vector_access_kernel, dim3(1), dim3(32), 512, nullptr, out.data(), in.data()), out, expected);
}

// Two phases of one mbarrier by expect_tx and separate arrivals, watched by test_wait; then the storage serves as data.
__global__ void mbarrier_kernel(float* out, const float* in) {
#if MMPO_SM90
    DYNAMIC_SHARED(raw);
    const uint32_t tile = shared_address(raw), barrier = tile + 128;
    float sum = 0.0f;
    if (threadIdx.x == 0) {
        mbarrier_init(barrier, 2);
        fence_mbarrier_init();
    }
    __syncthreads();
    for (uint32_t phase = 0; phase < 2; ++phase) {
        if (threadIdx.x == 0) {
            if (mbarrier_test_wait(barrier, phase)) sum += 1000.0f;
            mbarrier_expect_tx(barrier, 128);
            bulk_load(tile, in + phase * 32, 128, barrier);
            mbarrier_arrive(barrier);
        }
        if (threadIdx.x == 1) mbarrier_arrive(barrier);
        mbarrier_wait(barrier, phase);
        sum += reinterpret_cast<const float*>(raw)[threadIdx.x];
        __syncthreads();
    }
    if (threadIdx.x == 0) mbarrier_invalidate(barrier);
    __syncthreads();
    if (threadIdx.x == 0) store_shared_32(barrier, 0u);
    out[threadIdx.x] = sum;
#endif
}

CASE(mbarrier_phases) {
    DeviceArray<float> in(iota(64)), out(32);
    std::vector<float> expected(32);
    for (int i = 0; i < 32; ++i) expected[size_t(i)] = float(2 * i + 32);
    return outcome(LAUNCH(mbarrier_kernel, dim3(1), dim3(32), 144, nullptr, out.data(), in.data()), out, expected);
}

// A warpgroup gives registers to two others, one of which stores a 3-D box and then adds it once more. 384 threads start
// with 168 registers each, of 65536 in all: 40 and twice 232 take up exactly those.
__global__ void __launch_bounds__(384, 1) store_3d_kernel(const __grid_constant__ CUtensorMap map) {
#if MMPO_SM90
    DYNAMIC_SHARED(raw);
    if (threadIdx.x < 128) {
        setmaxnreg_decrease<40>();
        return;
    }
    setmaxnreg_increase<232>();
    if (threadIdx.x >= 256) return;
    const uint32_t t = threadIdx.x - 128;
    reinterpret_cast<float*>(raw)[t] = float(t);
    fence_proxy_async();
    bar_sync(1, 128);
    if (t == 0) {
        prefetch_tensor_map(&map);
        tma_store_3d(&map, shared_address(raw), 0, 0, 0);
        bulk_commit();
        bulk_wait<0>();
        tma_reduce_add_3d(&map, shared_address(raw), 0, 0, 0);
        bulk_commit();
        bulk_wait_read<0>();
    }
#endif
}

CASE(store_3d) {
    DeviceArray<float> out(128);
    const TensorMapShape shape{3, {8, 4, 4}, {8 * 4, 8 * 4 * 4}, {8, 4, 4}, Swizzle::none};
    CUtensorMap map;
    if (encode_tensor_map(&map, out.data(), CU_TENSOR_MAP_DATA_TYPE_FLOAT32, shape) != 0) return "no tensor map";
    std::vector<float> expected(128);
    for (int i = 0; i < 128; ++i) expected[size_t(i)] = float(2 * i);
    return outcome(LAUNCH(store_3d_kernel, dim3(1), dim3(384), 512, nullptr, map), out, expected);
}

}  // namespace
