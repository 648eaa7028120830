"""What is published of the devices that models are planned for, and how a user names a number of them.

Data only. Rates are the makers' figures for dense products, in units per second: peaks, which no program reaches.
Invariant: a figure that its maker does not publish is None, and nothing is estimated from it.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from jaxserve.core.errors import ConfigError

GIB, GB, TB, TERA = 1 << 30, 1e9, 1e12, 1e12
DEVICES_MAX = 4096      # in one plan
HOSTS_AT_ONCE = 8       # devices of a machine, where nothing is said


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceKind:
    """One product. Bytes a second are in one direction.

    Attributes:
      memory_bytes: None: the memory of this machine.
      bfloat16, int8, float32: products (multiplications and additions) a second; of bfloat16 summed in float32.
      link: to the devices of the same machine.  network: to another machine, each device's part.
    """

    name: str
    memory_bytes: int | None
    bandwidth: float | None = None
    bfloat16: float | None = None
    int8: float | None = None
    fp8: float | None = None
    float32: float | None = None
    link: float | None = None
    network: float | None = None
    capability: tuple[int, int] | None = None    # of CUDA

    @property
    def is_cpu(self) -> bool:
        return self.memory_bytes is None

    def rate(self, itemsize: int) -> float | None:
        """Operations a second on numbers of that many bytes."""
        return {1: self.int8, 2: self.bfloat16, 4: self.float32}[itemsize]


# Memory is named in GB by the makers and counted in GiB by the drivers, less up to half a percent.
# Network: one 400 Gbit/s adapter a GPU in a DGX H100, H200 and B200, 200 Gbit/s in a DGX A100 (NVIDIA, DGX guides); for
# the others one 100 Gbit/s adapter a GPU is assumed. PCIe 4.0 x16 moves 32 GB/s one way.
_PCIE4 = 32 * GB
_ASSUMED_NETWORK = 12.5 * GB

KINDS: tuple[DeviceKind, ...] = (
    DeviceKind(     # NVIDIA H200 Tensor Core GPU datasheet, SXM; "with sparsity" halved; NVLink 900 GB/s both ways
        name="H200", memory_bytes=141 * GIB, bandwidth=4.8 * TB, bfloat16=989.5 * TERA, int8=1979 * TERA,
        fp8=1979 * TERA, float32=67 * TERA, link=450 * GB, network=50 * GB, capability=(9, 0),
    ),
    DeviceKind(     # NVIDIA H100 Tensor Core GPU datasheet, SXM; "with sparsity" halved; NVLink 900 GB/s both ways
        name="H100", memory_bytes=80 * GIB, bandwidth=3.35 * TB, bfloat16=989.5 * TERA, int8=1979 * TERA,
        fp8=1979 * TERA, float32=67 * TERA, link=450 * GB, network=50 * GB, capability=(9, 0),
    ),
    DeviceKind(     # NVIDIA A100 Tensor Core GPU datasheet, 80GB SXM; NVLink 600 GB/s both ways; no FP8
        name="A100-80G", memory_bytes=80 * GIB, bandwidth=2.039 * TB, bfloat16=312 * TERA, int8=624 * TERA,
        float32=19.5 * TERA, link=300 * GB, network=25 * GB, capability=(8, 0),
    ),
    DeviceKind(     # NVIDIA A100 Tensor Core GPU datasheet, 40GB SXM
        name="A100-40G", memory_bytes=40 * GIB, bandwidth=1.555 * TB, bfloat16=312 * TERA, int8=624 * TERA,
        float32=19.5 * TERA, link=300 * GB, network=25 * GB, capability=(8, 0),
    ),
    DeviceKind(     # NVIDIA L40S datasheet: 362 dense of 733 TFLOPS; PCIe 4.0, no NVLink
        name="L40S", memory_bytes=48 * GIB, bandwidth=864 * GB, bfloat16=362.05 * TERA, int8=733 * TERA,
        fp8=733 * TERA, float32=91.6 * TERA, link=_PCIE4, network=_ASSUMED_NETWORK, capability=(8, 9),
    ),
    DeviceKind(     # NVIDIA L4 datasheet, "with sparsity" figures halved; PCIe 4.0, no NVLink
        name="L4", memory_bytes=24 * GIB, bandwidth=300 * GB, bfloat16=121 * TERA, int8=242.5 * TERA,
        fp8=242.5 * TERA, float32=30.3 * TERA, link=_PCIE4, network=_ASSUMED_NETWORK, capability=(8, 9),
    ),
    DeviceKind(     # NVIDIA HGX B200 datasheet, an eighth of the board, sparse ones halved; NVLink 1.8 TB/s
        name="B200", memory_bytes=180 * GIB, bandwidth=8 * TB, bfloat16=2250 * TERA, int8=4500 * TERA,
        fp8=4500 * TERA, float32=75 * TERA, link=900 * GB, network=50 * GB, capability=(10, 0),
    ),
    DeviceKind(     # AMD Instinct MI300X datasheet; Infinity Fabric: 7 links of 128 GB/s both ways
        name="MI300X", memory_bytes=192 * GIB, bandwidth=5.3 * TB, bfloat16=1307.4 * TERA, int8=2614.9 * TERA,
        fp8=2614.9 * TERA, float32=163.4 * TERA, link=448 * GB, network=50 * GB,
    ),
    DeviceKind(     # NVIDIA Ada GPU architecture whitepaper, table of the GeForce RTX 4090; PCIe 4.0, no NVLink
        name="RTX4090", memory_bytes=24 * GIB, bandwidth=1.008 * TB, bfloat16=165.2 * TERA, int8=660.6 * TERA,
        fp8=330.3 * TERA, float32=82.6 * TERA, link=_PCIE4, network=_ASSUMED_NETWORK, capability=(8, 9),
    ),
    DeviceKind(name="CPU", memory_bytes=None),    # this machine; its rates are for scripts/ceilings.py to measure
)
BY_NAME = {kind.name.lower(): kind for kind in KINDS}


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """Equal machines with equal devices in each."""

    kind: DeviceKind
    per_host: int
    hosts: int = 1

    @property
    def count(self) -> int:
        return self.hosts * self.per_host

    def __str__(self) -> str:
        return f"{f'{self.hosts}x' if self.hosts > 1 else ''}{self.per_host}x{self.kind.name}"


def parse_devices(text: str) -> Devices:
    """`H200`, `8xH200` or `2x8xH200`: machines, devices in each, and what they are. Raises ConfigError."""
    match = re.fullmatch(r"(?:(?:(\d+)x)?(\d+)x)?([A-Za-z][\w -]*)", text.strip())
    if match is None:
        raise ConfigError(f"devices {text!r} must be like H200, 8xH200 or 2x8xH200 (machines x devices x kind)")
    hosts, per_host, name = int(match[1] or 1), int(match[2] or 1), match[3]
    devices = Devices(kind=kind(name), per_host=per_host, hosts=hosts)
    if not 1 <= devices.count <= DEVICES_MAX:
        raise ConfigError(f"devices {text!r} are {devices.count}; plan for 1 to {DEVICES_MAX}")
    return devices


def kind(name: str) -> DeviceKind:
    """The device of that name, however it is spelt. Raises ConfigError."""
    wanted = re.sub(r"[\s_-]", "", name.lower())
    names = {re.sub(r"[\s_-]", "", known): known for known in BY_NAME}
    if wanted in names:
        return BY_NAME[names[wanted]]
    near = difflib.get_close_matches(wanted, names, 1)
    hint = f"; did you mean {BY_NAME[names[near[0]]].name}?" if near else ""
    raise ConfigError(f"unknown device {name!r}{hint} Known are {', '.join(known.name for known in KINDS)}")
