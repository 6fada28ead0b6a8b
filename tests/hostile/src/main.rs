//! A malicious blkif frontend in user space.

fn main() {}
