// Hopper gemms (common/gemm_sm90.cuh) in every tile and operand order, exact on small integers: ragged ones, ones with
// several tiles per block, and ones summed in parts.
#include <cmath>

#include "common/gemm_epilogues_sm90.cuh"
#include "harness.h"

using namespace mmpo::test;
using namespace mmpo::gemm_sm90;

namespace {

// Integers whose products and sums bf16 and f32 hold exactly.
std::vector<bf16> small_integers(int count, int step) {
    std::vector<bf16> values(size_t(count), bf16{});
    for (int i = 0; i < count; ++i) values[size_t(i)] = to_bf16(float(i * step % 7 - 3));
    return values;
}

struct Shape {
    int m, n, k;
};

// out[M, N] += left[M, K] * right[K, N], operands in the order that Lines says.
template <class Lines>
void multiply(std::vector<float>& out, const std::vector<bf16>& left, const std::vector<bf16>& right, Shape shape) {
    const auto at = [](Line line, const std::vector<bf16>& values, int outer, int depth, int outer_size, int depth_size) {
        return to_float(values[size_t(line == Line::depth ? outer * depth_size + depth : depth * outer_size + outer)]);
    };
    for (int m = 0; m < shape.m; ++m) {
        for (int n = 0; n < shape.n; ++n) {
            float sum = 0.0f;
            for (int k = 0; k < shape.k; ++k)
                sum += at(Lines::kLeft, left, m, k, shape.m, shape.k) * at(Lines::kRight, right, n, k, shape.n, shape.k);
            out[size_t(m * shape.n + n)] += sum;
        }
    }
}

template <class Tile>
GemmPlan plan_of(int splits = 1) {
    return {Tile::BLOCK_M, Tile::BLOCK_N, Tile::kCluster, splits, 2, 0.0};
}

// Adds to what is there; rounding to bf16 is another case's.
template <class Tile, class Lines>
std::string run_f32(Shape shape) {
    const std::vector<bf16> left_values = small_integers(shape.m * shape.k, 5);
    const std::vector<bf16> right_values = small_integers(shape.n * shape.k, 3);
    std::vector<float> expected = iota(size_t(shape.m * shape.n));
    DeviceArray<bf16> left(left_values), right(right_values);
    DeviceArray<float> out(expected);
    multiply<Lines>(expected, left_values, right_values, shape);
    StoreF32 epilogue{{}, shape.m, shape.n, true};
    if (encode_panel_map(&epilogue.out, out.data(), shape.m, shape.n) != 0) return "no tensor map";
    const GemmOperands operands{left.data(), right.data(), shape.m, shape.n, shape.k};
    return outcome(launch_tiles<Tile, Lines>(operands, plan_of<Tile>(), epilogue, nullptr), out, expected);
}

// Six tiles, so that one of the emulated device's four blocks gets two; rows of tiles are odd in number, so that the last
// cluster of two has one tile that is no part of `out`.
template <class Tile, class Lines>
std::string run_tiles() {
    return run_f32<Tile, Lines>({2 * Tile::BLOCK_M + 24, Tile::BLOCK_N + 40, 200});
}

CASE(gemm_128x256) { return run_tiles<Tile128x256, ForwardLines>(); }
CASE(gemm_128x256_paired) { return run_tiles<Paired<Tile128x256>, ForwardLines>(); }
CASE(gemm_128x256_paired_input) { return run_tiles<Paired<Tile128x256>, BackwardInputLines>(); }
CASE(gemm_192x192_paired_weight) { return run_tiles<Paired<Tile192x192>, BackwardWeightLines>(); }
CASE(gemm_192x192_input) { return run_tiles<Tile192x192, BackwardInputLines>(); }
CASE(gemm_128x192_weight) { return run_tiles<Tile128x192, BackwardWeightLines>(); }
CASE(gemm_128x128_weight) { return run_tiles<Tile128x128, BackwardWeightLines>(); }
CASE(gemm_64x128_input) { return run_tiles<Tile64x128, BackwardInputLines>(); }
CASE(gemm_64x128_weight) { return run_tiles<Tile64x128, BackwardWeightLines>(); }
// Less than one slice, one row, a stage ring that is never filled.
CASE(gemm_smallest) { return run_f32<Tile128x192, ForwardLines>({1, 8, 8}); }
CASE(gemm_smallest_paired) { return run_f32<Paired<Tile192x192>, ForwardLines>({1, 8, 8}); }

// Parts of the depth, each in rows of its own; the last part is a slice longer.
template <class Tile>
std::string run_parts() {
    constexpr int kParts = 3;
    const Shape shape{Tile::BLOCK_M + 6, 72, 7 * BLOCK_K};
    const GemmPlan plan = plan_of<Tile>(kParts);
    const int rows = int(split_rows(plan, shape.m));
    const std::vector<bf16> left_values = small_integers(shape.m * shape.k, 5);
    const std::vector<bf16> right_values = small_integers(shape.n * shape.k, 3);
    DeviceArray<bf16> left(left_values), right(right_values);
    DeviceArray<float> parts(size_t(kParts * rows * shape.n));
    StoreF32 epilogue{{}, kParts * rows, shape.n, false};
    if (encode_panel_map(&epilogue.out, parts.data(), kParts * rows, shape.n) != 0) return "no tensor map";
    const GemmOperands operands{left.data(), right.data(), shape.m, shape.n, shape.k};
    if (const mmpo_status error = launch_tiles<Tile, ForwardLines>(operands, plan, epilogue, nullptr)) return device_error(error);
    std::vector<float> sum(size_t(shape.m * shape.n), 0.0f), expected(sum);
    const std::vector<float> found = parts.download();
    for (int part = 0; part < kParts; ++part) {
        for (int i = 0; i < shape.m * shape.n; ++i) sum[size_t(i)] += found[size_t(part * rows * shape.n + i)];
    }
    multiply<ForwardLines>(expected, left_values, right_values, shape);
    return compare(sum, expected);
}

CASE(gemm_parts) { return run_parts<Tile64x128>(); }
// The second part starts after the tile that completes the cluster of the first.
CASE(gemm_parts_paired) { return run_parts<Paired<Tile128x256>>(); }

// Bias, and one rounding.
CASE(gemm_bf16) {
    using Tile = Tile128x256;
    const Shape shape{70, 264, 72};
    const std::vector<bf16> left_values = small_integers(shape.m * shape.k, 5);
    const std::vector<bf16> right_values = small_integers(shape.n * shape.k, 3), bias_values = small_integers(shape.n, 1);
    DeviceArray<bf16> left(left_values), right(right_values), bias(bias_values), out(size_t(shape.m * shape.n));
    StoreBf16 epilogue{{}, bias.data(), shape.m, shape.n};
    if (encode_panel_map(&epilogue.out, out.data(), shape.m, shape.n) != 0) return "no tensor map";
    const GemmOperands operands{left.data(), right.data(), shape.m, shape.n, shape.k};
    if (const mmpo_status error = launch_tiles<Tile, ForwardLines>(operands, plan_of<Tile>(), epilogue, nullptr))
        return device_error(error);
    std::vector<float> expected(size_t(shape.m * shape.n));
    for (size_t i = 0; i < expected.size(); ++i) expected[i] = to_float(bias_values[i % size_t(shape.n)]);
    multiply<ForwardLines>(expected, left_values, right_values, shape);
    std::vector<float> found;
    for (const bf16 value : out.download()) found.push_back(to_float(value));
    for (float& value : expected) value = to_float(to_bf16(value));
    return compare(found, expected);
}

// Gate and up side by side in one tile; 200 columns of each, so that the last tile is cut in both halves.
template <class Tile>
std::string run_swiglu() {
    constexpr int kWidth = 200;
    const Shape shape{150, 2 * kWidth, 72};
    const std::vector<bf16> left_values = small_integers(shape.m * shape.k, 5);
    const std::vector<bf16> right_values = small_integers(shape.n * shape.k, 3);
    DeviceArray<bf16> left(left_values), right(right_values);
    DeviceArray<bf16> gate_up(size_t(shape.m * shape.n)), out(size_t(shape.m * kWidth));
    StoreSwiGlu epilogue{{}, {}, {}, nullptr, shape.m, kWidth};
    if (encode_panel_map(&epilogue.gate, gate_up.data(), shape.m, kWidth, shape.n) != 0 ||
        encode_panel_map(&epilogue.up, gate_up.data() + kWidth, shape.m, kWidth, shape.n) != 0 ||
        encode_panel_map(&epilogue.out, out.data(), shape.m, kWidth) != 0)
        return "no tensor map";
    const GemmOperands operands{left.data(), right.data(), shape.m, shape.n, shape.k};
    if (const mmpo_status error = launch_tiles<Tile, GatedForwardLines>(operands, plan_of<Tile>(), epilogue, nullptr))
        return device_error(error);
    std::vector<float> expected(size_t(shape.m * shape.n), 0.0f), found;
    multiply<GatedForwardLines>(expected, left_values, right_values, shape);
    for (float& value : expected) value = to_float(to_bf16(value));
    const std::vector<bf16> stored = gate_up.download(), activated = out.download();
    for (const bf16 value : stored) found.push_back(to_float(value));
    if (const std::string wrong = compare(found, expected); !wrong.empty()) return "gate_up: " + wrong;
    for (int row = 0; row < shape.m; ++row) {
        for (int column = 0; column < kWidth; ++column) {
            const float gate = expected[size_t(row * shape.n + column)], up = expected[size_t(row * shape.n + kWidth + column)];
            const float wanted = gate / (1.0f + std::exp(-gate)) * up, value = to_float(activated[size_t(row * kWidth + column)]);
            if (!(std::fabs(value - wanted) <= 0.004f * std::fabs(wanted))) return "out: " + std::to_string(value) + ", not " + std::to_string(wanted);
        }
    }
    return "";
}

CASE(gemm_swiglu_128x256) { return run_swiglu<Tile128x256>(); }
CASE(gemm_swiglu_128x256_paired) { return run_swiglu<Paired<Tile128x256>>(); }
CASE(gemm_swiglu_128x128) { return run_swiglu<Tile128x128>(); }

}  // namespace
