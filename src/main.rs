//! blkholefs: block devices as regular files with real holes.

fn main() {}
