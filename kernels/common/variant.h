// Which build of the kernels this is, and what its C symbols are called. Plain C, preprocessor only.
//
// The same sources are compiled up to three times into one program:
//   gpu      by nvcc                                         mmpo_<name>
//   plain    as host C++ on the emulated device, fast        mmpo_emulated_<name>   -DMMPO_EMULATED_VARIANT=plain
//   checked  the same, every load and store instrumented     mmpo_checked_<name>    -DMMPO_EMULATED_VARIANT=checked
// C++ symbols of the builds do not clash: headers put everything into `namespace mmpo { inline namespace MMPO_VARIANT`,
// and a .cu file keeps everything but its launchers in an anonymous namespace.
#pragma once

#if defined(MMPO_EMULATED_VARIANT)
#define MMPO_EMULATED 1
#define MMPO_VARIANT MMPO_EMULATED_VARIANT
#else
#define MMPO_EMULATED 0
#define MMPO_VARIANT gpu
#endif

#define MMPO_CONCAT_TOKENS(a, b) a##b
#define MMPO_CONCAT(a, b) MMPO_CONCAT_TOKENS(a, b)
#define MMPO_EXPORT_gpu(name) mmpo_##name
#define MMPO_EXPORT_plain(name) mmpo_emulated_##name
#define MMPO_EXPORT_checked(name) mmpo_checked_##name
#define MMPO_IS_CHECKED_gpu 0
#define MMPO_IS_CHECKED_plain 0
#define MMPO_IS_CHECKED_checked 1

// `extern "C" int MMPO_EXPORT(rms_norm_forward)(...)` defines this variant's launcher.
#define MMPO_EXPORT(name) MMPO_CONCAT(MMPO_EXPORT_, MMPO_VARIANT)(name)
// 1 in the instrumented variant.
#define MMPO_CHECKED MMPO_CONCAT(MMPO_IS_CHECKED_, MMPO_VARIANT)
