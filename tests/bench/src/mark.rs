// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Marks: instructions that do nothing, and that the plugin of the emulator sees.

/// Numbers the marks, as the plugin does.
#[derive(Debug)]
pub(crate) struct Marks {
    next: u64,
    ignored: bool,
}

impl Marks {
    /// The first ones. There may be one value of this only.
    pub(crate) fn new() -> Marks {
        Marks {
            next: 0,
            ignored: false,
        }
    }

    /// Marks that are not set: for a run whose instructions nobody wants to know.
    pub(crate) fn ignored() -> Marks {
        Marks {
            next: 0,
            ignored: true,
        }
    }

    /// Sets a mark and returns its number.
    pub(crate) fn set(&mut self) -> u64 {
        if self.ignored {
            return 0;
        }
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
