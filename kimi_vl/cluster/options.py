"""How many replicas there are, and what each of them gets."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..serving.options import OptionError


@dataclass(frozen=True)
class ClusterOptions:
    """How many replicas there are, and what each of them gets."""

    replicas: int = 1
    max_replicas: int = 0
    """More than ``replicas``: replicas are added while requests wait, up to this many."""
    gpus_per_replica: float = 1.0
    target_ongoing: float = 0.0
    """Requests a replica that autoscaling aims at; 0 is 0.7 of ``max_num_seqs``."""
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    dashboard: bool = False

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise OptionError("--replicas must be at least 1")
        if self.max_replicas and self.max_replicas < self.replicas:
            raise OptionError("--max-replicas must not be less than --replicas")
        for name in ("gpus_per_replica", "target_ongoing", "upscale_delay_s", "downscale_delay_s"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise OptionError(f"--{name.replace('_', '-')} must be at least 0")
        if self.gpus_per_replica > 1 and self.gpus_per_replica % 1:
            raise OptionError("--gpus-per-replica must be a whole number where it is more than 1")
