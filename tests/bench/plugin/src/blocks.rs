// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! Counts of a block of instructions: instructions, copies and turns.
//!
//! The emulated processor has no fast string instructions. So the hypervisor copies a word with each step of `rep
//! movsq`, and Linux with a loop of three instructions a word. A plain count would rate a copy by Linux three times as
//! high as one by the hypervisor.

/// Number of known bytes of an instruction.
pub(crate) type Length = usize;
/// Its first bytes.
pub(crate) type LeadingBytes = [u8; 8];

/// Effects of a block each time that it runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct BlockEffects {
    /// Instructions that do not copy.
    pub(crate) instructions: u64,
    /// Instructions that copy, and their number of bytes.
    pub(crate) copying: u64,
    pub(crate) copied: u64,
    /// The block ends with a `pause` of a domain, which gives up the processor's turn.
    pub(crate) pauses: bool,
}

/// Kind of an instruction, where it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum InstructionKind {
    /// A step of a string move of this number of bytes.
    Move(u64),
    /// Loads a word from where `rsi` points.
    Load,
    /// Stores a word to where `rdi` points.
    Store,
    Pause,
    Other,
}

/// An instruction that ends a turn in a way that the plugin counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// A kernel calls the hypervisor.
    Hypercall,
    /// The hypervisor has nothing to run on this processor.
    Halt,
}

impl Turn {
    /// Meaning of such an instruction in the hypervisor and in a kernel. A PV kernel under Xen uses `syscall` only for
    /// hypercalls; kernels in hardware virtual machines use the other two.
    pub(crate) fn of((bytes, length): (LeadingBytes, Length), in_hypervisor: bool) -> Option<Turn> {
        match (bytes.get(..length)?, in_hypervisor) {
            ([0xf4], true) => Some(Turn::Halt),
            ([0x0f, 0x05] | [0x0f, 0x01, 0xc1 | 0xd9], false) => Some(Turn::Hypercall),
            _ => None,
        }
    }
}

const REP: u8 = 0xf3;
const PAUSE: [u8; 2] = [REP, 0x90];
/// Words that one iteration of the kernel's loop copies.
const WORDS: u64 = 4;
const WORD: u64 = 8;

impl InstructionKind {
    fn of((bytes, length): (LeadingBytes, Length)) -> InstructionKind {
        let bytes = bytes.get(..length).unwrap_or(&bytes);
        match bytes {
            [REP, 0x48, 0xa5] => InstructionKind::Move(8),
            [REP, 0xa5] => InstructionKind::Move(4),
            [REP, 0xa4] => InstructionKind::Move(1),
            // A word (REX.W), no register added to the address, at most a byte of displacement.
            [rex, 0x8b, operands, ..] if word(*rex) && points(*operands, 6) => {
                InstructionKind::Load
            }
            [rex, 0x89, operands, ..] if word(*rex) && points(*operands, 7) => {
                InstructionKind::Store
            }
            _ if bytes == PAUSE => InstructionKind::Pause,
            _ => InstructionKind::Other,
        }
    }
}

/// Returns true for a prefix that makes the operand a word and does not change the address.
fn word(rex: u8) -> bool {
    rex & 0xfb == 0x48
}

/// Returns true if the memory operand is at this register's address, or up to 127 bytes from there.
fn points(operands: u8, register: u8) -> bool {
    operands >> 6 <= 1 && operands & 7 == register
}

impl BlockEffects {
    /// Returns the effects of a block of these instructions.
    pub(crate) fn of(
        instructions: impl Iterator<Item = (LeadingBytes, Length)>,
        in_domain: bool,
    ) -> BlockEffects {
        let (mut block, mut loads, mut stores) = (BlockEffects::default(), 0, 0);
        for kind in instructions.map(InstructionKind::of) {
            block.pauses = in_domain && kind == InstructionKind::Pause;
            match kind {
                InstructionKind::Move(bytes) => {
                    block.copying += 1;
                    block.copied += bytes;
                    continue;
                }
                InstructionKind::Load => loads += 1,
                InstructionKind::Store => stores += 1,
                InstructionKind::Pause | InstructionKind::Other => {}
            }
            block.instructions += 1;
        }
        // The other instructions of an iteration count the loop and advance the pointers.
        if loads == WORDS && stores == WORDS {
            block.copied += WORDS * WORD;
            block.copying += block.instructions;
            block.instructions = 0;
        }
        block
    }

    /// Packs the block and a counter into one number. A block has far fewer than 2^12 instructions.
    pub(crate) fn pack(self, counter: usize) -> usize {
        let numbers = [self.instructions, self.copying, self.copied];
        let packed = numbers.iter().fold(counter, |packed, number| {
            packed << 12 | (*number & 0xfff) as usize
        });
        packed << 1 | usize::from(self.pauses)
    }

    /// Unpacks the counter and the block.
    pub(crate) fn unpack(packed: usize) -> (usize, BlockEffects) {
        let number = |shift: u32| (packed >> shift & 0xfff) as u64;
        let block = BlockEffects {
            instructions: number(25),
            copying: number(13),
            copied: number(1),
            pauses: packed & 1 != 0,
        };
        (packed >> 37, block)
    }
}

#[cfg(test)]
mod tests {
    use super::{BlockEffects, LeadingBytes, Length, Turn};

    fn instruction(text: &[u8]) -> (LeadingBytes, Length) {
        let mut bytes = LeadingBytes::default();
        bytes[..text.len()].copy_from_slice(text);
        (bytes, text.len())
    }

    fn block(instructions: &[&[u8]], in_domain: bool) -> BlockEffects {
        BlockEffects::of(instructions.iter().map(|text| instruction(text)), in_domain)
    }

    /// An iteration of the loop of Linux's `memcpy_orig`, forward.
    const TURN: [&[u8]; 12] = [
        &[0x48, 0x83, 0xea, 0x20],
        &[0x4c, 0x8b, 0x06],
        &[0x4c, 0x8b, 0x4e, 0x08],
        &[0x4c, 0x8b, 0x56, 0x10],
        &[0x4c, 0x8b, 0x5e, 0x18],
        &[0x48, 0x8d, 0x76, 0x20],
        &[0x4c, 0x89, 0x07],
        &[0x4c, 0x89, 0x4f, 0x08],
        &[0x4c, 0x89, 0x57, 0x10],
        &[0x4c, 0x89, 0x5f, 0x18],
        &[0x48, 0x8d, 0x7f, 0x20],
        &[0x73, 0xd4],
    ];

    #[test]
    fn copies_are_bytes_and_no_instructions() {
        let turn = block(&TURN, false);
        assert_eq!((turn.instructions, turn.copying, turn.copied), (0, 12, 32));
        let string = block(&[&[0x90], &[0xf3, 0x48, 0xa5]], false);
        assert_eq!(
            (string.instructions, string.copying, string.copied),
            (1, 1, 8)
        );
        // Without one of its loads it counts as an ordinary block; so does one that copies through the stack.
        let others = [&TURN[..1], &TURN[2..]].concat();
        assert_eq!(block(&others, false).copied, 0);
        let stack: [&[u8]; 2] = [&[0x48, 0x8b, 0x46, 0x08], &[0x48, 0x89, 0x47, 0x08]];
        assert_eq!(block(&stack, false).copied, 0);
    }

    #[test]
    fn hypercalls_are_of_kernels_and_halts_of_the_hypervisor() {
        let turn = |text: &[u8], xen: bool| Turn::of(instruction(text), xen);
        for call in [&[0x0f, 0x05][..], &[0x0f, 0x01, 0xc1], &[0x0f, 0x01, 0xd9]] {
            assert_eq!(turn(call, false), Some(Turn::Hypercall));
            assert_eq!(turn(call, true), None);
        }
        assert_eq!(turn(&[0xf4], true), Some(Turn::Halt));
        assert_eq!(turn(&[0xf4], false), None);
        assert_eq!(turn(&[0x0f, 0x01, 0xc8], false), None);
    }

    #[test]
    fn only_a_domain_looks() {
        let pause: [&[u8]; 2] = [&[0x90], &[0xf3, 0x90]];
        assert!(block(&pause, true).pauses && !block(&pause, false).pauses);
        let later = [&pause[1], &pause[0]].map(|text| *text);
        assert!(!block(&later, true).pauses);
    }

    #[test]
    fn what_is_packed_is_unpacked() {
        let block = BlockEffects {
            instructions: 511,
            copying: 12,
            copied: 512,
            pauses: true,
        };
        assert_eq!(BlockEffects::unpack(block.pack(50000)), (50000, block));
        assert_eq!(
            BlockEffects::unpack(BlockEffects::default().pack(7)),
            (7, BlockEffects::default())
        );
    }
}
