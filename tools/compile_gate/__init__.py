"""Every kernel compiled and checked for every supported architecture, without a GPU (docs/compile_gate.md)."""
