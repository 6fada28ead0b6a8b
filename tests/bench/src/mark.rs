// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Marks: instructions that do nothing, and that the plugin of the emulator sees.

/// Numbers the marks, as the plugin does.
#[derive(Debug, Default)]
pub(crate) struct Marks(u64);

impl Marks {
    /// Sets a mark and returns its number.
    pub(crate) fn set(&mut self) -> u64 {
        // SAFETY: a `nop` that names a memory operand does not touch it.
        unsafe {
            std::arch::asm!(
                ".byte 0x0f, 0x1f, 0x84, 0x00, 0x6d, 0x61, 0x72, 0x6b",
                options(nomem, nostack, preserves_flags)
            );
        }
        self.0 += 1;
        self.0 - 1
    }
}
