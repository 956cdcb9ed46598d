"""The type checker of the tests: beartype, applied by jaxtyping to all of eyechart."""

from typing import Any, Literal, Self, get_origin

from beartype import BeartypeConf, beartype

# An int is a float to everyone but isinstance (PEP 484).
_with_numeric_tower = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Any) -> Any:
    """Check a function's arguments and result; annotations in quotes are left unchecked.

    Quoted names belong to libraries that eyechart imports for type checkers only; Self cannot be
    checked on a function outside its class; and a value that no Literal lists must reach eyechart's
    own error.
    """
    annotations = getattr(function, "__annotations__", {})
    function.__annotations__ = {
        name: Any if _left_alone(hint) else hint for name, hint in annotations.items()
    }
    return _with_numeric_tower(function)


def _left_alone(hint: Any) -> bool:
    return isinstance(hint, str) or hint is Self or get_origin(hint) is Literal
