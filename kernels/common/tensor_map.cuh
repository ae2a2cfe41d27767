// Host side of TMA, for launchers: encodes tensor maps of row-major bf16 or f32 arrays.
#pragma once

#include "device.cuh"

namespace mmpo {
inline namespace MMPO_VARIANT {

// A 2- or 3-dimensional array in global memory, and the box of it that one copy moves. Index 0 is the innermost
// dimension.
struct TensorMapShape {
    int rank;
    uint64_t sizes[3];          // elements; those from `rank` on are not read
    uint64_t strides_bytes[2];  // of dimensions 1 and 2, multiples of 16
    uint32_t box[3];            // elements, at most 256 each; the innermost spans exactly the swizzle, if there is one
    Swizzle swizzle;
};

inline CUtensorMapSwizzle tensor_map_swizzle(Swizzle swizzle) {
    switch (swizzle) {
        case Swizzle::bytes_128:
            return CU_TENSOR_MAP_SWIZZLE_128B;
        case Swizzle::bytes_64:
            return CU_TENSOR_MAP_SWIZZLE_64B;
        case Swizzle::bytes_32:
            return CU_TENSOR_MAP_SWIZZLE_32B;
        default:
            return CU_TENSOR_MAP_SWIZZLE_NONE;
    }
}

// Encodes `out` (64-byte aligned). Elements outside the array read as zero.
inline mmpo_status encode_tensor_map(CUtensorMap* out, const void* base, CUtensorMapDataType type,
                                     const TensorMapShape& shape) {
#if MMPO_EMULATED
    const auto encode = &cuTensorMapEncodeTiled;
#else
    // The driver is asked for it once, at run time, so that the program does not link against the driver.
    using Encode = decltype(&cuTensorMapEncodeTiled);
    static const Encode encode = [] {
        void* entry = nullptr;
        cudaDriverEntryPointQueryResult found;
        const cudaError_t error =
            cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
        return error == cudaSuccess ? reinterpret_cast<Encode>(entry) : nullptr;
    }();
    if (encode == nullptr) return int(cudaErrorNotSupported);
#endif
    const cuuint32_t element_strides[3] = {1, 1, 1};
    return int(encode(out, type, cuuint32_t(shape.rank), const_cast<void*>(base), shape.sizes, shape.strides_bytes,
                      shape.box, element_strides, CU_TENSOR_MAP_INTERLEAVE_NONE, tensor_map_swizzle(shape.swizzle),
                      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE));
}

// A row-major bf16 matrix [rows, columns] whose rows lie `row_elements` apart, moved in boxes [box_rows, box_columns].
inline mmpo_status encode_tensor_map_2d(CUtensorMap* out, const bf16* base, uint64_t rows, uint64_t columns,
                                        uint64_t row_elements, uint32_t box_rows, uint32_t box_columns,
                                        Swizzle swizzle) {
    TensorMapShape shape{};
    shape.rank = 2;
    shape.sizes[0] = columns;
    shape.sizes[1] = rows;
    shape.strides_bytes[0] = row_elements * sizeof(bf16);
    shape.box[0] = box_columns;
    shape.box[1] = box_rows;
    shape.swizzle = swizzle;
    return encode_tensor_map(out, base, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, shape);
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
