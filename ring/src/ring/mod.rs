//! Everything that crosses a trust boundary, as checked types.
