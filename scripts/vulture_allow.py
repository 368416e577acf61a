"""Names that look unused and are not. Each has its reason."""

# ruff: noqa: F821, B018 - attributes of nothing in particular are vulture's own syntax

_.redirect_slashes  # read by Starlette's router
_.collect  # called by prometheus_client's registry
_.should_exit  # read by uvicorn's server
_.long_text, _.huge_text, _.long_system  # filled into requests by name
_.normalizer, _.encode_special_tokens  # read by tokenizers' own code
