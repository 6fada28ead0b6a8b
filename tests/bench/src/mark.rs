// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Marks: instructions without an effect, which the plugin of the emulator detects.

/// Numbers the marks, as the plugin does.
#[derive(Debug)]
pub(crate) struct Marks {
    next: u64,
}

impl Marks {
    /// Starts the numbering. Only one value of this may exist.
    pub(crate) fn new() -> Marks {
        Marks { next: 0 }
    }

    /// Sets a mark and returns its number.
    pub(crate) fn set(&mut self) -> u64 {
        // SAFETY: a `nop` that names a memory operand does not touch it.
        unsafe {
            std::arch::asm!(
                ".byte 0x0f, 0x1f, 0x84, 0x00, 0x6d, 0x61, 0x72, 0x6b",
                options(nomem, nostack, preserves_flags)
            );
        }
        self.next += 1;
        self.next - 1
    }
}
