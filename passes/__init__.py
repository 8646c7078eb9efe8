"""The compiler's passes, one a file: file name = function name = pass name. Installed as ``tofu_fx.passes``."""

if __name__ != "tofu_fx.passes":
    raise ImportError("import tofu_fx.passes, not passes: the folder is mapped into the tofu_fx package")
