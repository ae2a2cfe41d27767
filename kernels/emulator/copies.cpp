// Shared memory's storage, cp.async, and the tensor memory accelerator.
#include <algorithm>
#include <mutex>

#include "block.h"
#include "memory.h"
#include "tensor_map.h"

namespace mmpo {
inline namespace MMPO_VARIANT {
namespace emulated {

// ---- shared memory

unsigned char* dynamic_shared() { return running->shared; }

void* static_shared(const void* key, size_t bytes, size_t alignment, Site site) {
    Block& block = *running;
    for (const StaticShared& array : block.static_arrays) {
        if (array.key == key) return block.shared + array.offset;
    }
    const size_t unit = std::max<size_t>(alignment, 16);
    const size_t offset = (block.shared_end + unit - 1) / unit * unit;
    if (offset + bytes > kSharedLimit)
        fail(site, "%zu bytes of static shared memory on top of %zu pass the limit of %zu", bytes, offset,
             kSharedLimit);
    block.shared_end = uint32_t(offset + bytes);
    block.static_arrays.push_back({key, uint32_t(offset)});
    memset(block.shared + offset, kFreshByte, bytes);
    if (kChecked) block.shadow.open(uint32_t(offset), uint32_t(bytes));
    return block.shared + offset;
}

uint32_t shared_address(const void* pointer, Site site) {
    const size_t offset = size_t(static_cast<const unsigned char*>(pointer) - running->shared);
    // One past the end is an address one may form.
    if (offset <= std::max(running->dynamic_bytes, running->shared_end)) return kSharedBase + uint32_t(offset);
    fail(site, "%p is not in shared memory", pointer);
}

unsigned char* shared_storage(uint32_t address, uint32_t bytes, uint32_t alignment, const char* what, Site site) {
    const uint32_t end = std::max(running->dynamic_bytes, running->shared_end);
    if (address < kSharedBase || size_t(address - kSharedBase) + bytes > end)
        fail(site, "%s: %u bytes at shared 0x%x are out of bounds: the block has %u bytes from 0x%x", what, bytes,
             address, end, kSharedBase);
    if (address % alignment != 0) fail(site, "%s: shared 0x%x is not aligned to %u bytes", what, address, alignment);
    return running->shared + (address - kSharedBase);
}

bool early(Block& block) {
    switch (options.async) {
        case MMPO_EMULATOR_ASYNC_EARLY:
            return true;
        case MMPO_EMULATOR_ASYNC_LATE:
            return false;
        default:
            return block.random() % 2 == 0;
    }
}

// ---- cp.async

namespace {

void land(CopyAsync& copy) {
    unsigned char* to = running->shared + (copy.destination - kSharedBase);
    memcpy(to, copy.source, size_t(copy.source_bytes));
    memset(to + copy.source_bytes, 0, size_t(copy.bytes - copy.source_bytes));
    copy.landed = true;
}

}  // namespace

void copy_async(uint32_t destination, const void* source, int bytes, int source_bytes, Site site) {
    Thread& thread = self();
    shared_storage(destination, uint32_t(bytes), uint32_t(bytes), "cp.async", site);
    if (uintptr_t(source) % size_t(bytes) != 0)
        fail(site, "cp.async: global %p is not aligned to %d bytes", source, bytes);
    if (source_bytes != 0) {
        check_global(thread, uintptr_t(source), size_t(source_bytes), false, site);
        check_block_order(thread, uintptr_t(source), size_t(source_bytes), false, site);
    }
    running->counters.copy_async_bytes += uint64_t(source_bytes);
    // The write is compared with earlier accesses now, because its data may land at any time from now on. It is
    // remembered at the wait that makes it visible.
    if (kChecked) race_access(thread, {destination - kSharedBase, uint32_t(bytes), true, Proxy::generic, false}, site);
    thread.copies.operations.push_back({destination, source, bytes, source_bytes, false, site});
    if (early(*running)) land(thread.copies.operations.back());
}

void copy_async_commit(Site) { self().copies.commit(); }

void copy_async_wait(int groups_left, Site) {
    Thread& thread = self();
    GroupQueue<CopyAsync>& queue = thread.copies;
    for (const size_t due = queue.due(groups_left); queue.finished < due; ++queue.finished) {
        CopyAsync& copy = queue.operations[queue.finished];
        if (!copy.landed) land(copy);
        if (kChecked) {
            const uint32_t offset = copy.destination - kSharedBase;
            race_access(thread, {offset, uint32_t(copy.bytes), true, Proxy::generic, true}, copy.site);
            mark_shared_written(offset, uint32_t(copy.bytes));
        }
    }
    if (queue.drained()) queue.clear();
}

// ---- tensor maps

namespace {

constexpr uint32_t kTensorMapMagic = 0x7e50a11e;

// The swizzled address. The permutation of 16-byte chunks depends only on the shared address; `mode` is 0 for none,
// then 1, 2, 3 for 32, 64, 128 bytes.
uint32_t swizzled(uint32_t address, int mode) {
    static constexpr uint32_t kMask[] = {0, 0x10, 0x30, 0x70};
    return address ^ (address >> 3 & kMask[mode]);
}

const TensorMap& checked_map(const void* map, Coordinates at, uint32_t shared, const char* what, Site site) {
    const TensorMap& tensor = *static_cast<const TensorMap*>(map);
    if (uintptr_t(map) % 64 != 0 || tensor.magic != kTensorMapMagic)
        fail(site, "%s: %p is not an encoded tensor map, aligned to 64 bytes", what, map);
    if (tensor.rank != at.rank)
        fail(site, "%s: a %d-D instruction on a %d-D tensor map", what, at.rank, int(tensor.rank));
    shared_storage(shared, tensor.box_bytes(), 128, what, site);
    return tensor;
}

// Calls `visit(shared address, global address or 0, first byte inside, end byte inside)` for each innermost row of a
// box. "Inside" means inside the tensor; a row that lies outside as a whole has global address 0.
template <class Visit>
void each_box_row(const TensorMap& map, uint32_t shared, Coordinates at, Visit visit) {
    const int64_t first = std::max<int64_t>(0, at.at[0]);
    const int64_t last = std::min<int64_t>(int64_t(map.sizes[0]), int64_t(at.at[0]) + map.box[0]);
    for (uint32_t z = 0; z < map.box[2]; ++z) {
        for (uint32_t y = 0; y < map.box[1]; ++y, shared += map.row_bytes()) {
            const int64_t row = int64_t(at.at[1]) + y, plane = int64_t(at.at[2]) + z;
            const bool inside =
                first < last && row >= 0 && row < int64_t(map.sizes[1]) && plane >= 0 && plane < int64_t(map.sizes[2]);
            const uintptr_t global = inside ? map.base + uint64_t(plane) * map.strides[1] +
                                                  uint64_t(row) * map.strides[0] + uint64_t(first) * map.element_bytes
                                            : 0;
            const uint32_t from = inside ? uint32_t(first - at.at[0]) * map.element_bytes : 0;
            const uint32_t to = inside ? uint32_t(last - at.at[0]) * map.element_bytes : 0;
            visit(shared, global, from, to);
        }
    }
}

// Calls `visit(shared bytes, global bytes, first, last)` for each 16-byte chunk of a row, where [first, last) is the
// part of the chunk that lies inside the tensor.
template <class Visit>
void each_chunk(const TensorMap& map, uint32_t shared, uintptr_t global, uint32_t from, uint32_t to, Visit visit) {
    for (uint32_t at = 0; at < map.row_bytes(); at += 16) {
        unsigned char* chunk = running->shared + (swizzled(shared + at, map.swizzle) - kSharedBase);
        const uint32_t first = std::min(std::max(at, from), at + 16), last = std::max(first, std::min(at + 16, to));
        visit(chunk, reinterpret_cast<unsigned char*>(global + (first - from)), first - at, last - at);
    }
}

}  // namespace

// ---- bulk loads

namespace {

void start_load(BulkLoad load) {
    Block& block = *running;
    if (kChecked) {
        MbarrierClock& clock = block.mbarrier_clocks[load.mbarrier];
        load.unit = clock.unit;
        load.tick = ++clock.tick;
        race_access(self(), load.unit, load.tick,
                    {load.destination - kSharedBase, load.bytes(), true, Proxy::async, true}, load.site);
    }
    block.loads.push_back(load);
    if (options.async == MMPO_EMULATOR_ASYNC_EARLY) land_one_load();
}

void land_box(const BulkLoad& load) {
    each_box_row(load.map, load.destination, load.at,
                 [&](uint32_t shared, uintptr_t global, uint32_t from, uint32_t to) {
                     if (to > from) {
                         check_global(*load.issuer, global, to - from, false, load.site);
                         check_block_order(*load.issuer, global, to - from, false, load.site);
                     }
                     each_chunk(load.map, shared, global, from, to,
                                [](unsigned char* chunk, unsigned char* bytes, uint32_t first, uint32_t last) {
                                    memset(chunk, 0, 16);
                                    if (last > first) memcpy(chunk + first, bytes, last - first);
                                });
                 });
}

void check_mbarrier(uint32_t address, const char* what, Site site) {
    shared_storage(address, 8, 8, what, site);
    if (kChecked) race_access(self(), {address - kSharedBase, 8, false, Proxy::generic, false}, site);
}

}  // namespace

// Lets one of the loads under way land, drawn at random, because no order among them is promised.
void land_one_load() {
    Block& block = *running;
    const size_t index = block.random() % block.loads.size();
    const BulkLoad load = block.loads[index];
    if (load.issuer->block != &block) require_present(block, "TMA multicast", load.site);
    block.loads.erase(block.loads.begin() + std::ptrdiff_t(index));
    if (load.bulk_source != nullptr) {
        check_global(*load.issuer, uintptr_t(load.bulk_source), load.bulk_bytes, false, load.site);
        memcpy(block.shared + (load.destination - kSharedBase), load.bulk_source, load.bulk_bytes);
    } else {
        land_box(load);
    }
    if (kChecked) mark_shared_written(load.destination - kSharedBase, load.bytes());
    if (!load.repeated) block.counters.tensor_load_bytes += load.bytes();
    mbarrier_complete_bytes(load);
}

void tensor_load(uint32_t destination, const void* map, Coordinates at, uint32_t mbarrier, Site site) {
    const TensorMap& tensor = checked_map(map, at, destination, "TMA load", site);
    check_mbarrier(mbarrier, "TMA load", site);
    start_load({tensor, nullptr, 0, destination, mbarrier, at, &self(), 0, 0, false, site});
}

void tensor_load_multicast(uint32_t destination, const void* map, Coordinates at, uint32_t mbarrier, uint32_t ranks,
                           Site site) {
    const std::vector<Block*>& blocks = running->cluster->blocks;
    if (ranks == 0 || ranks >> blocks.size() != 0)
        fail(site, "TMA multicast: mask %x names blocks that a cluster of %zu has not", ranks, blocks.size());
    bool repeated = false;
    for (Block* block : blocks) {
        if ((ranks >> block->cluster_rank & 1u) == 0) continue;
        require_present(*block, "TMA multicast", site);
        const Inside inside(*block);
        const TensorMap& tensor = checked_map(map, at, destination, "TMA multicast", site);
        check_mbarrier(mbarrier, "TMA multicast", site);
        start_load({tensor, nullptr, 0, destination, mbarrier, at, &self(), 0, 0, repeated, site});
        repeated = true;
    }
}

void bulk_load(uint32_t destination, const void* source, uint32_t bytes, uint32_t mbarrier, Site site) {
    shared_storage(destination, bytes, 16, "bulk load", site);
    if (uintptr_t(source) % 16 != 0 || bytes % 16 != 0 || bytes == 0)
        fail(site, "bulk load: %u bytes from %p; both must be multiples of 16", bytes, source);
    check_mbarrier(mbarrier, "bulk load", site);
    start_load({TensorMap{}, source, bytes, destination, mbarrier, Coordinates(0, 0), &self(), 0, 0, false, site});
}

// ---- bulk stores

namespace {

void add_bf16(unsigned char* to, const unsigned char* value, uint32_t bytes) {
    for (uint32_t i = 0; i < bytes; i += 2) {
        uint16_t sum, term;
        memcpy(&sum, to + i, 2);
        memcpy(&term, value + i, 2);
        uint32_t bits =
            uint32_t(to_bits(from_bits<float>(uint32_t(sum) << 16) + from_bits<float>(uint32_t(term) << 16)));
        bits = (bits & 0x7fffffffu) > 0x7f800000u ? 0x7fff0000u : bits + 0x7fffu + (bits >> 16 & 1u);
        sum = uint16_t(bits >> 16);
        memcpy(to + i, &sum, 2);
    }
}

void add_f32(unsigned char* to, const unsigned char* value, uint32_t bytes) {
    for (uint32_t i = 0; i < bytes; i += 4) {
        float sum, term;
        memcpy(&sum, to + i, 4);
        memcpy(&term, value + i, 4);
        sum += term;
        memcpy(to + i, &sum, 4);
    }
}

void store_bytes(const TensorStore& store, unsigned char* to, const unsigned char* from, uint32_t bytes) {
    if (store.kind == BulkStore::assign) {
        memcpy(to, from, bytes);
        return;
    }
    static std::mutex adding;  // other blocks may add to the same element
    std::lock_guard<std::mutex> lock(adding);
    if (store.map.type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32) return add_f32(to, from, bytes);
    add_bf16(to, from, bytes);
}

void land_bulk(const TensorStore& store, Thread& thread) {
    const uintptr_t to = uintptr_t(store.bulk_destination);
    if (store.kind == BulkStore::add) check_global(thread, to, store.bulk_bytes, false, store.site);
    check_global(thread, to, store.bulk_bytes, true, store.site);
    if (store.kind == BulkStore::assign) check_block_order(thread, to, store.bulk_bytes, true, store.site);
    store_bytes(store, static_cast<unsigned char*>(store.bulk_destination),
                running->shared + (store.source - kSharedBase), store.bulk_bytes);
}

void land_box(const TensorStore& store, Thread& thread) {
    each_box_row(store.map, store.source, store.at, [&](uint32_t shared, uintptr_t global, uint32_t from, uint32_t to) {
        if (to <= from) return;
        if (store.kind == BulkStore::add) check_global(thread, global, to - from, false, store.site);
        check_global(thread, global, to - from, true, store.site);
        if (store.kind == BulkStore::assign) check_block_order(thread, global, to - from, true, store.site);
        each_chunk(store.map, shared, global, from, to,
                   [&](unsigned char* chunk, unsigned char* bytes, uint32_t first, uint32_t last) {
                       if (last > first) store_bytes(store, bytes, chunk + first, last - first);
                   });
    });
}

void land(TensorStore& store, Thread& thread) {
    if (store.bulk_destination != nullptr)
        land_bulk(store, thread);
    else
        land_box(store, thread);
    store.landed = true;
}

void start_store(const TensorStore& store) {
    Thread& thread = self();
    if (thread.turn_unfenced)
        fail(store.site,
             "a bulk store after wait_for_turn without a fence.proxy.async.global: it may pass the other block's");
    running->counters.tensor_store_bytes += store.bytes();
    if (kChecked) {
        const uint32_t offset = store.source - kSharedBase;
        race_access(thread, {offset, store.bytes(), false, Proxy::async, true}, store.site);
        require_shared_written(thread, offset, store.bytes(), store.site);
    }
    thread.stores.operations.push_back(store);
    if (early(*running)) land(thread.stores.operations.back(), thread);
}

}  // namespace

void tensor_store(const void* map, uint32_t source, Coordinates at, BulkStore kind, Site site) {
    const TensorMap& tensor = checked_map(map, at, source, "TMA store", site);
    if (kind == BulkStore::add && tensor.type != CU_TENSOR_MAP_DATA_TYPE_FLOAT32 &&
        tensor.type != CU_TENSOR_MAP_DATA_TYPE_BFLOAT16)
        fail(site, "TMA reduce: only f32 and bf16 tensor maps are modelled");
    start_store({tensor, nullptr, 0, source, at, kind, false, site});
}

void bulk_store(void* destination, uint32_t source, uint32_t bytes, BulkStore kind, Site site) {
    shared_storage(source, bytes, 16, "bulk store", site);
    if (uintptr_t(destination) % 16 != 0 || bytes % 16 != 0 || bytes == 0)
        fail(site, "bulk store: %u bytes to %p; both must be multiples of 16", bytes, destination);
    TensorMap plain{};
    plain.type = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
    start_store({plain, destination, bytes, source, Coordinates(0, 0), kind, false, site});
}

void bulk_commit(Site) { self().stores.commit(); }

void bulk_wait(int groups_left, bool, Site) {
    Thread& thread = self();
    GroupQueue<TensorStore>& queue = thread.stores;
    for (const size_t due = queue.due(groups_left); queue.finished < due; ++queue.finished) {
        TensorStore& store = queue.operations[queue.finished];
        if (!store.landed) land(store, thread);
        // Until now the asynchronous unit has been reading the source, so that the thread may write it only from here
        // on.
        if (kChecked)
            race_access(thread, {store.source - kSharedBase, store.bytes(), false, Proxy::async, true}, store.site);
    }
    if (queue.drained()) queue.clear();
}

// Fails if the thread exits while something that it must wait for is unfinished.
void check_thread_exit(Thread& thread) {
    if (!thread.copies.drained())
        fail(thread.copies.operations.back().site, "the thread exits without waiting for this cp.async");
    if (!thread.stores.drained())
        fail(thread.stores.operations.back().site, "the thread exits without waiting for this bulk store");
    if (thread.wgmma.waited < thread.wgmma.issued) {
        const Warpgroup& group = running->warpgroups[thread.linear / kWarpgroup];
        fail(group.queue.back().site, "the thread exits without waiting for this wgmma");
    }
    if (running->live == 1 && !running->loads.empty())
        fail(running->loads.back().site, "the block ends without waiting for this load to shared memory");
}

}  // namespace emulated

CUresult cuTensorMapEncodeTiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* base,
                                const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                                const cuuint32_t* element_strides, CUtensorMapInterleave interleave,
                                CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    static constexpr uint8_t kElementBytes[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2};
    static constexpr uint32_t kSpan[] = {0, 32, 64, 128};
    constexpr uint64_t kMaxSize = uint64_t(1) << 32, kMaxStride = uint64_t(1) << 40;
    if (uintptr_t(out) % 64 != 0 || uintptr_t(base) % 16 != 0 || rank < 2 || rank > 3) return CUDA_ERROR_INVALID_VALUE;
    if (type > CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE)
        return CUDA_ERROR_INVALID_VALUE;
    emulated::TensorMap map{};
    map.magic = emulated::kTensorMapMagic;
    map.rank = uint8_t(rank);
    map.element_bytes = kElementBytes[type];
    map.swizzle = uint8_t(swizzle);
    map.type = uint8_t(type);
    map.base = uint64_t(base);
    for (cuuint32_t i = 0; i < 3; ++i) {
        map.sizes[i] = i < rank ? sizes[i] : 1;
        map.box[i] = i < rank ? box[i] : 1;
        if (map.sizes[i] == 0 || map.sizes[i] > kMaxSize || map.box[i] == 0 || map.box[i] > 256)
            return CUDA_ERROR_INVALID_VALUE;
        if (i < rank && element_strides[i] != 1) return CUDA_ERROR_INVALID_VALUE;
    }
    for (cuuint32_t i = 0; i + 1 < rank; ++i) {
        if (strides[i] % 16 != 0 || strides[i] >= kMaxStride) return CUDA_ERROR_INVALID_VALUE;
        map.strides[i] = strides[i];
    }
    if (map.row_bytes() % 16 != 0) return CUDA_ERROR_INVALID_VALUE;
    if (swizzle != CU_TENSOR_MAP_SWIZZLE_NONE && map.row_bytes() != kSpan[swizzle]) return CUDA_ERROR_INVALID_VALUE;
    memset(out, 0, sizeof *out);
    memcpy(out, &map, sizeof map);
    return CUDA_SUCCESS;
}

}  // namespace MMPO_VARIANT
}  // namespace mmpo
