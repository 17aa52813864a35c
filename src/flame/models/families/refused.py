"""Families of fla that are not trained here, each with the reason and what to take instead."""

from __future__ import annotations

_NO_SEGMENTS = "its layers carry a state over document boundaries; "
_NOT_PROVEN = "packed documents are not proven apart in it; "

# model_type to reason, which ends with the families to use
REFUSED: dict[str, str] = {
    "mamba": _NO_SEGMENTS + "use mamba2",
    "mamba3": _NO_SEGMENTS + "use mamba2",
    "samba": "its Mamba layers carry a state over document boundaries; use gla or kda with attn.layers",
    "log_linear_mamba2": _NO_SEGMENTS + "use mamba2",
    "abc": "its layer refuses packed rows; use gsa",
    "bitnet": _NOT_PROVEN + "use transformer",
    "cat": "it compresses chunks that know no documents; use transformer",
    "cyclic_flow_attention": _NOT_PROVEN + "use gsa",
    "deltaformer": _NOT_PROVEN + "use delta_net or transformer",
    "mesa_net": _NOT_PROVEN + "use gated_deltanet",
    "mla": _NOT_PROVEN + "use transformer",
    "moba": "its blocks of keys need a kernel that is not here; use transformer with window_size",
    "mom": "its router and balance loss are not in the trainer's loss; use gated_deltanet",
    "nsa": "its selected blocks are not proven to stay within documents; use transformer with window_size",
    "parallax": _NOT_PROVEN + "use transformer",
    "path_attn": _NOT_PROVEN + "use transformer or delta_net",
    "precond_gated_deltanet": _NOT_PROVEN + "use gated_deltanet",
    "precond_kda": _NOT_PROVEN + "use kda",
    "raven": _NOT_PROVEN + "use gsa",
    "rodimus": _NOT_PROVEN + "use gla",
    "stickbreaking_attn": _NOT_PROVEN + "use transformer",
    "wall_transformer": _NOT_PROVEN + "use transformer",
    "yoco": _NOT_PROVEN + "use gated_deltanet with attn.layers",
}
