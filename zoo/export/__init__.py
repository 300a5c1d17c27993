"""Export: folders that `transformers` loads without this package.

`remote_code/` is no part of the package but data: a hybrid's folder gets a copy of its files,
which transformers runs. They need torch and transformers only.
"""

from zoo.export.folder import check_exportable, export_model

__all__ = ["check_exportable", "export_model"]
