// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! Numbers that must not be taken for one another.

macro_rules! number {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(u16);

        impl $name {
            /// The one of this number.
            #[inline]
            pub const fn new(number: u16) -> Self {
                Self(number)
            }

            /// Its number.
            #[inline]
            pub const fn number(self) -> u16 {
                self.0
            }

            /// Its place in a table.
            #[inline]
            pub const fn index(self) -> usize {
                self.0 as usize
            }
        }
    };
}

number!(
    /// Names a request that a queue works on: the number of its slot, below those of its ring.
    QueueTag
);
number!(
    /// Names a request of a disk that a process serves, over all its queues.
    DiskTag
);
number!(
    /// A data page of a queue: its place in the segment table.
    PageIndex
);
