//! What GPUs can do at most, from their makers' data sheets.

/// Peak rates of a machine.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize)]
pub struct Rates {
    /// 10^12 dense bf16 operations per second, with f32 accumulation.
    pub tflops: f64,
    /// 10^9 bytes of device memory per second.
    pub bandwidth: f64,
    /// 10^9 bytes per second and direction of the bus to the host's memory.
    pub bus: f64,
}

impl Rates {
    /// Share of the peak that gemms are expected to reach. Like the shares below it is an expectation from the design of the
    /// kernels, as `benches/predictions.json` has them: measure with `mmpo-fast bench step`, and state `--tflops` and `--bandwidth`
    /// to plan with what was measured.
    pub const GEMM_SHARE: f64 = 0.65;
    /// Share of the peak that attention is expected to reach over forward and backward.
    pub const ATTENTION_SHARE: f64 = 0.4;
    /// Share of the bandwidth that operations reach which only move bytes.
    pub const BANDWIDTH_SHARE: f64 = 0.85;
    /// Share of the bus that copies of pinned memory are expected to reach, in both directions at once.
    pub const BUS_SHARE: f64 = 0.8;
    /// Sixteen lanes of PCIe 4.0, in each direction: the bus of a machine of which nothing else is known.
    pub const PCIE_4: f64 = 32.0;
    /// Sixteen lanes of PCIe 5.0.
    pub const PCIE_5: f64 = 64.0;
}

/// A kind of GPU.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GpuKind {
    /// A part of the name that the driver gives, which no other kind of the table has as its first match.
    pub name: &'static str,
    /// Its peak rates.
    pub rates: Rates,
    /// The memory as it is sold, taken as 10^9 bytes: a driver has a little more to give.
    pub memory: f64,
    /// Whether it runs Hopper's kernels: compute capability 9.0.
    pub is_hopper: bool,
}

const fn kind(name: &'static str, tflops: f64, bandwidth: f64, memory: f64, is_hopper: bool) -> GpuKind {
    GpuKind { name, rates: Rates { tflops, bandwidth, bus: Rates::PCIE_4 }, memory, is_hopper }
}

/// A kind on PCIe 5.0.
const fn with_pcie_5(kind: GpuKind) -> GpuKind {
    GpuKind { rates: Rates { bus: Rates::PCIE_5, ..kind.rates }, ..kind }
}

/// From NVIDIA's data sheets, dense rates: those of H200 (2024), H100 (2023), A100 (2021), L40S and L4 (2023), A40 and A10 (2021),
/// and for workstation and consumer cards the white papers of Ampere GA102, Ada and Blackwell, whose tensor cores have half of
/// their rate with f32 accumulation on consumer cards. The bus is the one that they name, with sixteen lanes. Longer names come before those that they begin with.
pub const GPUS: &[GpuKind] = &[
    with_pcie_5(kind("H200 NVL", 835.5, 4800.0, 141.0, true)),
    with_pcie_5(kind("H200", 989.4, 4800.0, 141.0, true)),
    with_pcie_5(kind("H100 NVL", 835.5, 3900.0, 94.0, true)),
    with_pcie_5(kind("H100 PCIe", 756.0, 2000.0, 80.0, true)),
    with_pcie_5(kind("H100", 989.4, 3350.0, 80.0, true)),
    kind("A100-SXM4-40GB", 312.0, 1555.0, 40.0, false),
    kind("A100-PCIE-40GB", 312.0, 1555.0, 40.0, false),
    kind("A100 80GB PCIe", 312.0, 1935.0, 80.0, false),
    kind("A100", 312.0, 2039.0, 80.0, false),
    kind("L40S", 362.0, 864.0, 48.0, false),
    kind("L4", 121.0, 300.0, 24.0, false),
    kind("A40", 149.7, 696.0, 48.0, false),
    kind("A10", 125.0, 600.0, 24.0, false),
    kind("RTX A6000", 154.8, 768.0, 48.0, false),
    kind("RTX 6000 Ada", 364.2, 960.0, 48.0, false),
    with_pcie_5(kind("RTX 5090", 209.5, 1792.0, 32.0, false)),
    kind("RTX 4090", 165.2, 1008.0, 24.0, false),
    kind("RTX 3090", 71.0, 936.0, 24.0, false),
];

/// The kind whose name is part of `text`, a GPU's name or a device's description, in any case of letters.
pub fn find(text: &str) -> Option<&'static GpuKind> {
    let text = text.to_lowercase();
    // `L4` must not be found in `L40S`, nor `A10` in `A100`: what follows a name is not part of a longer one.
    let is_named = |kind: &&GpuKind| {
        let name = kind.name.to_lowercase();
        text.match_indices(&name).any(|(at, _)| {
            let after = text[at + name.len()..].chars().next();
            let before = text[..at].chars().next_back();
            !after.is_some_and(char::is_alphanumeric) && !before.is_some_and(char::is_alphanumeric)
        })
    };
    GPUS.iter().find(is_named)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gpus_are_found_by_the_names_that_the_driver_gives() {
        for (text, name) in [
            ("cuda:0 (NVIDIA H200, compute capability 9.0, 140 GiB; products: cuBLASLt 13.0)", "H200"),
            ("NVIDIA H100 80GB HBM3", "H100"),
            ("NVIDIA H100 PCIe", "H100 PCIe"),
            ("NVIDIA A100-SXM4-80GB", "A100"),
            ("NVIDIA A100-SXM4-40GB", "A100-SXM4-40GB"),
            ("NVIDIA L40S", "L40S"),
            ("NVIDIA L4", "L4"),
            ("NVIDIA A10", "A10"),
            ("nvidia geforce rtx 4090", "RTX 4090"),
            ("h200", "H200"),
        ] {
            assert_eq!(find(text).map(|kind| kind.name), Some(name), "{text}");
        }
        assert_eq!(find("cpu (AMD EPYC)"), None);
        assert_eq!(find("NVIDIA A10G"), None);
    }
}
