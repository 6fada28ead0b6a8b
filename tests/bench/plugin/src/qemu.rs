// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The entry point, and the functions of QEMU's plugin interface (version 4) that are used.

use crate::places::{self, COUNTERS, MARK};
use std::ffi::{c_char, c_int, c_uint, c_void, CStr};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::{Mutex, OnceLock, PoisonError};

/// A translation block: opaque.
enum Block {}
/// An instruction of a block: opaque.
enum Instruction {}
/// Memory with one element for each processor: opaque.
enum Scoreboard {}

/// One 64-bit number in each element.
#[repr(C)]
struct Entry {
    board: *mut Scoreboard,
    offset: usize,
}

const OP_ADD: c_int = 0;
const NO_REGISTERS: c_int = 0;

extern "C" {
    fn qemu_plugin_register_vcpu_tb_trans_cb(id: u64, translated: extern "C" fn(u64, *mut Block));
    fn qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(
        block: *mut Block,
        op: c_int,
        entry: Entry,
        operand: u64,
    );
    fn qemu_plugin_register_vcpu_insn_exec_cb(
        instruction: *mut Instruction,
        executed: extern "C" fn(c_uint, *mut c_void),
        flags: c_int,
        data: *mut c_void,
    );
    fn qemu_plugin_tb_n_insns(block: *const Block) -> usize;
    fn qemu_plugin_tb_vaddr(block: *const Block) -> u64;
    fn qemu_plugin_tb_get_insn(block: *const Block, index: usize) -> *mut Instruction;
    fn qemu_plugin_insn_data(
        instruction: *const Instruction,
        place: *mut c_void,
        length: usize,
    ) -> usize;
    fn qemu_plugin_scoreboard_new(size: usize) -> *mut Scoreboard;
    fn qemu_plugin_scoreboard_find(board: *mut Scoreboard, processor: c_uint) -> *mut c_void;
    fn qemu_plugin_num_vcpus() -> c_int;
}

/// The interface that this plugin was written for.
#[no_mangle]
#[allow(unreachable_pub)] // QEMU reaches it by its name.
#[allow(non_upper_case_globals)]
pub static qemu_plugin_version: c_int = 4;

struct State {
    board: *mut Scoreboard,
    /// The file, and how many marks it has.
    out: Mutex<(BufWriter<File>, u64)>,
}

// SAFETY: QEMU locks the board itself; the pointer is never used for anything but its functions.
unsafe impl Send for State {}
// SAFETY: as above.
unsafe impl Sync for State {}

static STATE: OnceLock<State> = OnceLock::new();

/// Called once by QEMU; `out=FILE` among the arguments names the file of the counters.
///
/// # Safety
/// `argv` holds `argc` strings, as QEMU promises.
#[no_mangle]
#[allow(unreachable_pub)] // QEMU reaches it by its name.
pub unsafe extern "C" fn qemu_plugin_install(
    id: u64,
    _info: *const c_void,
    argc: c_int,
    argv: *const *const c_char,
) -> c_int {
    let mut arguments = (0..usize::try_from(argc).unwrap_or(0)).map(|index| {
        // SAFETY: QEMU passes that many strings.
        let text = unsafe { CStr::from_ptr(*argv.add(index)) };
        text.to_string_lossy().into_owned()
    });
    let Some(path) = arguments.find_map(|text| text.strip_prefix("out=").map(str::to_owned)) else {
        eprintln!("bench-plugin: give it the argument out=FILE");
        return 1;
    };
    let file = match File::create(&path) {
        Ok(file) => file,
        Err(error) => {
            eprintln!("bench-plugin: cannot write {path}: {error}");
            return 1;
        }
    };
    // SAFETY: plain call; the board lives as long as QEMU.
    let board = unsafe { qemu_plugin_scoreboard_new(COUNTERS * size_of::<u64>()) };
    let out = Mutex::new((BufWriter::new(file), 0));
    if STATE.set(State { board, out }).is_err() {
        eprintln!("bench-plugin: it can be loaded once only");
        return 1;
    }
    // SAFETY: the function has the type that QEMU expects.
    unsafe { qemu_plugin_register_vcpu_tb_trans_cb(id, translated) };
    0
}

/// A block was translated: whenever it runs, its length is added to the counter of its place.
extern "C" fn translated(_id: u64, block: *mut Block) {
    let Some(state) = STATE.get() else { return };
    // SAFETY: QEMU passes a block that is valid during this call.
    let (address, count) = unsafe { (qemu_plugin_tb_vaddr(block), qemu_plugin_tb_n_insns(block)) };
    let counter = places::counter(address);
    let entry = Entry {
        board: state.board,
        offset: counter * size_of::<u64>(),
    };
    // SAFETY: as above, and the offset is inside the board's element.
    unsafe {
        qemu_plugin_register_vcpu_tb_exec_inline_per_vcpu(block, OP_ADD, entry, count as u64);
    }
    if places::NAMES.get(counter) != Some(&"user") {
        return;
    }
    for index in 0..count {
        mark_if_it_is(block, index);
    }
}

fn mark_if_it_is(block: *mut Block, index: usize) {
    let mut bytes = [0u8; MARK.len()];
    // SAFETY: the index is below the number of instructions, and `bytes` has that length.
    unsafe {
        let instruction = qemu_plugin_tb_get_insn(block, index);
        let length = qemu_plugin_insn_data(instruction, bytes.as_mut_ptr().cast(), bytes.len());
        if length == MARK.len() && bytes == MARK {
            let nothing = std::ptr::null_mut();
            qemu_plugin_register_vcpu_insn_exec_cb(instruction, marked, NO_REGISTERS, nothing);
        }
    }
}

/// The mark was executed.
extern "C" fn marked(_processor: c_uint, _data: *mut c_void) {
    let Some(state) = STATE.get() else { return };
    if let Err(error) = dump(state) {
        eprintln!("bench-plugin: cannot write the counters: {error}");
    }
}

fn dump(state: &State) -> std::io::Result<()> {
    let mut out = state.out.lock().unwrap_or_else(PoisonError::into_inner);
    let (file, marks) = &mut *out;
    writeln!(file, "mark {marks}")?;
    *marks += 1;
    // SAFETY: plain call.
    let processors = unsafe { qemu_plugin_num_vcpus() };
    for processor in 0..c_uint::try_from(processors).unwrap_or(0) {
        // SAFETY: the element of each processor holds COUNTERS numbers. In a machine whose processors
        // take turns, none runs during this call.
        let counters = unsafe {
            let element = qemu_plugin_scoreboard_find(state.board, processor);
            std::slice::from_raw_parts(element.cast::<u64>(), COUNTERS)
        };
        for (counter, value) in counters.iter().enumerate().filter(|(_, value)| **value > 0) {
            writeln!(file, "{processor} {} {value}", places::name(counter))?;
        }
    }
    file.flush()
}
