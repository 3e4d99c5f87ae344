"""The names of the forms of the constraint and of their hyperparameters, for what must do without torch.

They are read from constraint_fields.pyi, which a test holds against the table of forms.
"""

import ast
from pathlib import Path

_STUB = ast.parse(Path(__file__).with_name("constraint_fields.pyi").read_text(encoding="utf-8"))
_ALIAS = next(node for node in _STUB.body if isinstance(node, ast.AnnAssign))
_CLASS = next(node for node in _STUB.body if isinstance(node, ast.ClassDef))
_FIELDS = [ast.unparse(node.target) for node in _CLASS.body if isinstance(node, ast.AnnAssign)]

FORM_NAMES: tuple[str, ...] = tuple(str(node.value) for node in ast.walk(_ALIAS) if isinstance(node, ast.Constant))
HYPERPARAMETER_NAMES: tuple[str, ...] = tuple(name for name in _FIELDS if name != "constraint")
