import os

# A notebook's kernel leaves the name of its backend in the environment of what it starts, where matplotlib may not know
# it and then can't be imported. No figure here needs one.
_backend = os.environ.pop("MPLBACKEND", None)
try:
    import matplotlib  # noqa: F401
finally:
    if _backend is not None:
        os.environ["MPLBACKEND"] = _backend
