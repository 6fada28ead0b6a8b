//! End to end tests that run inside a Xen machine.

fn main() {}
