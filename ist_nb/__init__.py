"Importance-aware Sparse Tuning (IST). Names are imported when first used, so that `ist_finetune --help` need not wait for torch."
__version__ = "0.1.0"

_home = dict(IST='ist', ISTConfig='config', ISTError='config', ISTCallback='callback', find_layers='layers', BottleneckConfig='adapters')
__all__ = list(_home)

def __getattr__(name):
    if name not in _home: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module
    return getattr(import_module(f'{__name__}.{_home[name]}'), name)

def __dir__(): return [*globals(), *__all__]
