// Undefined behaviour in kernels' own code, as the compiler's checks report it to the checked variant: misaligned
// vectors, indices past the end of local arrays, signed overflow (offsets that need 64 bits), impossible shifts.
// compile.rs renames the compiler's `__ubsan_handle_*` calls to these.
#include "block.h"

#if MMPO_CHECKED

using namespace mmpo::emulated;

namespace {

// Every check's data starts with where it stands.
struct CheckedSite {
    const char* file;
    uint32_t line, column;
    operator Site() const { return {file, int(line)}; }
};

struct MisalignedSite {
    CheckedSite site;
    const void* type;
    uint8_t log_alignment;
};

void report(const CheckedSite& site, const char* what) {
    // Launchers are instrumented like kernels; only what a thread of the device does is reported.
    if (current_thread != nullptr) fail(site, "%s", what);
}

}  // namespace

extern "C" {

void mmpo_checked_undefined_type_mismatch_v1(const MisalignedSite* data, uintptr_t address) {
    const uintptr_t alignment = uintptr_t(1) << data->log_alignment;
    if (current_thread == nullptr) return;
    if (address % alignment != 0)
        fail(data->site, "misaligned access: %p needs %zu bytes", reinterpret_cast<void*>(address), size_t(alignment));
    fail(data->site, "access through a null pointer");
}

#define MMPO_UNDEFINED(name, what) \
    void mmpo_checked_undefined_##name(const CheckedSite* site, uintptr_t, uintptr_t) { report(*site, what); }

MMPO_UNDEFINED(out_of_bounds, "index past the end of an array")
MMPO_UNDEFINED(shift_out_of_bounds, "shift by more than the width of the type")
MMPO_UNDEFINED(add_overflow, "signed overflow in an addition")
MMPO_UNDEFINED(sub_overflow, "signed overflow in a subtraction")
MMPO_UNDEFINED(mul_overflow, "signed overflow in a multiplication; offsets of tokens x width need 64 bits")
MMPO_UNDEFINED(negate_overflow, "signed overflow in a negation")
MMPO_UNDEFINED(divrem_overflow, "division by zero, or overflow in a division")
MMPO_UNDEFINED(pointer_overflow, "pointer arithmetic past the end of the address space")

}  // extern "C"

#endif
