"""What `nvidia-smi` prints on hosts that we do not have: written after its form, not recorded.

Element names, units, `N/A` and the order of elements follow drivers 550 to 580; what bora does not
read is left out but for elements that repeat names it does read.
"""

from __future__ import annotations

from collections.abc import Sequence

_HEAD = """<?xml version="1.0" ?>
<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log>
\t<timestamp>Sun Nov 22 10:00:00 2026</timestamp>
\t<driver_version>{driver}</driver_version>
\t<cuda_version>13.0</cuda_version>
\t<attached_gpus>{count}</attached_gpus>
{gpus}
</nvidia_smi_log>
"""
_GPU = """\t<gpu id="00000000:{bus:02X}:00.0">
\t\t<product_name>{name}</product_name>
\t\t<product_architecture>{architecture}</product_architecture>
\t\t<mig_mode>
\t\t\t<current_mig>{mig}</current_mig>
\t\t\t<pending_mig>{mig}</pending_mig>
\t\t</mig_mode>
\t\t<mig_devices>{slices}</mig_devices>
\t\t<uuid>{uuid}</uuid>
\t\t<minor_number>{index}</minor_number>
\t\t<pci>
\t\t\t<pci_bus>{bus:02X}</pci_bus>
\t\t\t<pci_gpu_link_info>
\t\t\t\t<pcie_gen>
\t\t\t\t\t<max_link_gen>{generation}</max_link_gen>
\t\t\t\t\t<current_link_gen>1</current_link_gen>
\t\t\t\t\t<device_current_link_gen>1</device_current_link_gen>
\t\t\t\t\t<max_device_link_gen>{generation}</max_device_link_gen>
\t\t\t\t\t<max_host_link_gen>{generation}</max_host_link_gen>
\t\t\t\t</pcie_gen>
\t\t\t\t<link_widths>
\t\t\t\t\t<max_link_width>16x</max_link_width>
\t\t\t\t\t<current_link_width>{width}x</current_link_width>
\t\t\t\t</link_widths>
\t\t\t</pci_gpu_link_info>
\t\t</pci>
\t\t<fb_memory_usage>
\t\t\t<total>{mib} MiB</total>
\t\t\t<reserved>{reserved} MiB</reserved>
\t\t\t<used>{used}</used>
\t\t\t<free>{used}</free>
\t\t</fb_memory_usage>
\t\t<bar1_memory_usage>
\t\t\t<total>131072 MiB</total>
\t\t\t<used>1 MiB</used>
\t\t\t<free>131071 MiB</free>
\t\t</bar1_memory_usage>
\t\t<ecc_mode>
\t\t\t<current_ecc>{ecc}</current_ecc>
\t\t\t<pending_ecc>{ecc}</pending_ecc>
\t\t</ecc_mode>
\t\t<ecc_errors>
\t\t\t<volatile>
\t\t\t\t<sram_correctable>{zero}</sram_correctable>
\t\t\t\t<sram_uncorrectable_parity>{zero}</sram_uncorrectable_parity>
\t\t\t\t<sram_uncorrectable_secded>{zero}</sram_uncorrectable_secded>
\t\t\t\t<dram_correctable>{zero}</dram_correctable>
\t\t\t\t<dram_uncorrectable>{errors}</dram_uncorrectable>
\t\t\t</volatile>
\t\t\t<aggregate>
\t\t\t\t<dram_uncorrectable>17</dram_uncorrectable>
\t\t\t</aggregate>
\t\t</ecc_errors>
\t\t<remapped_rows>
\t\t\t<remapped_row_corr>0</remapped_row_corr>
\t\t\t<remapped_row_unc>0</remapped_row_unc>
\t\t\t<remapped_row_pending>{pending}</remapped_row_pending>
\t\t\t<remapped_row_failure>No</remapped_row_failure>
\t\t</remapped_rows>
\t</gpu>"""
_SLICE = """
\t\t\t<mig_device>
\t\t\t\t<index>{index}</index>
\t\t\t\t<gpu_instance_id>{instance}</gpu_instance_id>
\t\t\t\t<compute_instance_id>0</compute_instance_id>
\t\t\t\t<device_attributes>
\t\t\t\t\t<shared>
\t\t\t\t\t\t<multiprocessor_count>60</multiprocessor_count>
\t\t\t\t\t</shared>
\t\t\t\t</device_attributes>
\t\t\t\t<fb_memory_usage>
\t\t\t\t\t<total>{mib} MiB</total>
\t\t\t\t\t<reserved>0 MiB</reserved>
\t\t\t\t\t<used>44 MiB</used>
\t\t\t\t\t<free>40404 MiB</free>
\t\t\t\t</fb_memory_usage>
\t\t\t</mig_device>
"""


def gpu(
    index: int,
    name: str,
    *,
    mib: int,
    generation: int = 4,
    width: int = 16,
    ecc: str = "Enabled",
    errors: str = "0",
    pending: str = "No",
    slices: Sequence[int] = (),
) -> str:
    """`slices`: MiB of each MIG slice."""
    listed = "".join(
        _SLICE.format(index=each, instance=each + 1, mib=size) for each, size in enumerate(slices)
    )
    return _GPU.format(
        index=index,
        bus=0x18 + index,
        name=name,
        architecture="Hopper",
        uuid=f"GPU-{index:08d}-aaaa",
        mib=mib,
        reserved=500,
        used="N/A" if slices else "4 MiB",
        generation=generation,
        width=width,
        ecc=ecc,
        zero="N/A" if ecc == "N/A" else "0",
        errors="N/A" if ecc == "N/A" else errors,
        pending=pending,
        mig="Enabled" if slices else "Disabled",
        slices=listed or "\n\t\t\tNone\n\t\t",
    )


def smi_log(*gpus: str, driver: str = "580.95.05") -> str:
    return _HEAD.format(driver=driver, count=len(gpus), gpus="\n".join(gpus))


def h100(index: int) -> str:
    return gpu(index, "NVIDIA H100 80GB HBM3", mib=81559, generation=5)


def rtx_4090(index: int) -> str:
    return gpu(index, "NVIDIA GeForce RTX 4090", mib=24564, ecc="N/A", width=8)


def topology(entries: Sequence[Sequence[str]], nic: bool = False) -> str:
    """`nvidia-smi topo -m` for a matrix of entries, its header underlined as on a terminal."""
    count = len(entries)
    names = [f"GPU{index}" for index in range(count)] + (["NIC0"] if nic else [])
    head = "\t" + "\t".join(f"\x1b[4m{name}" for name in names)
    head += "\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m"
    rows = [
        "\t".join([f"GPU{index}", *row, *(["NODE"] if nic else []), "0-31", "0", "N/A"])
        for index, row in enumerate(entries)
    ]
    rows += ["\t".join(["NIC0", *["NODE"] * count, " X "])] if nic else []
    legend = "\nLegend:\n\n  X    = Self\n  SYS  = Connection traversing PCIe as well as the SMP\n"
    return "\n".join([head, *rows]) + "\n" + legend


def peers(entries: Sequence[Sequence[str]]) -> str:
    """`nvidia-smi topo -p2p r`."""
    names = " ".join(f"\tGPU{index}" for index in range(len(entries)))
    rows = [" ".join([f" GPU{index}", *row]) for index, row in enumerate(entries)]
    legend = "\nLegend:\n\n  X    = Self\n  OK   = Status Ok\n  CNS  = Chipset not supported\n"
    return "\n".join([f" {names}", *rows]) + "\n" + legend


def full(count: int, entry: str) -> list[list[str]]:
    """A matrix with `entry` everywhere but on the diagonal."""
    return [["X" if row == col else entry for col in range(count)] for row in range(count)]


MIG_LISTING = """GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-00000000-aaaa)
  MIG 3g.40gb     Device  0: (UUID: MIG-11111111-aaaa)
  MIG 1g.10gb+me  Device  1: (UUID: MIG-22222222-aaaa)
GPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-00000001-aaaa)
"""
