"""Named model sizes: presets are functions, pipelines pass a name and overrides."""

from models.onerec_v2 import V2Config


def tiny(codes: int, levels: int = 3) -> V2Config:
    """d 128, 3 layers: demonstrations and CI on a CPU."""
    return V2Config(codes=codes, levels=levels, d_model=128, layers=3, heads=4, kv_groups=2, embed=32)


def small(codes: int, levels: int = 3) -> V2Config:
    """d 512, 4 layers, about 20 M parameters: one GPU, or a patient CPU."""
    return V2Config(codes=codes, levels=levels, d_model=512, layers=4, heads=8, kv_groups=2, embed=64)


PRESETS = {"tiny": tiny, "small": small}


def preset(name: str, codes: int, levels: int = 3) -> V2Config:
    """The preset called ``name``; raises ValueError naming the known ones."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; the presets are {', '.join(PRESETS)}")
    return PRESETS[name](codes, levels)
