// SPDX-License-Identifier: GPL-2.0-only OR MIT
//! The entry point, and the functions of QEMU's plugin interface (version 4) that the plugin uses.
//!
//! Callbacks get a processor's number, but in a machine whose processors take turns QEMU stores that number in a block
//! at translation. For code that all processors run, such as the hypervisor's, it is the first one that ran it. So the
//! plugin reads QEMU's own variable instead.

use crate::blocks::{BlockEffects, Length, Turn};
use crate::places::{self, CountedBlocks, COUNTERS, FIXED, MARK};
use std::ffi::{c_char, c_int, c_uint, c_void, CStr};
use std::fs::File;
use std::io::{BufWriter, Write};
use std::sync::atomic::{AtomicPtr, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, OnceLock, PoisonError};

/// A translation block: opaque.
enum TranslationBlock {}
/// An instruction of a block: opaque.
enum Instruction {}
/// A register of a processor: opaque.
enum Register {}
const NO_REGISTERS: c_int = 0;
const READS_REGISTERS: c_int = 1;

/// QEMU's description of a register.
#[repr(C)]
struct Description {
    handle: *mut Register,
    name: *const c_char,
    feature: *const c_char,
}

/// GLib's `GArray` and `GByteArray`.
#[repr(C)]
struct Array<T> {
    data: *mut T,
    length: c_uint,
}

extern "C" {
    fn qemu_plugin_register_vcpu_tb_trans_cb(
        id: u64,
        translated: extern "C" fn(u64, *mut TranslationBlock),
    );
    fn qemu_plugin_register_vcpu_tb_exec_cb(
        block: *mut TranslationBlock,
        executed: extern "C" fn(c_uint, *mut c_void),
        flags: c_int,
        data: *mut c_void,
    );
    fn qemu_plugin_register_vcpu_insn_exec_cb(
        instruction: *mut Instruction,
        executed: extern "C" fn(c_uint, *mut c_void),
        flags: c_int,
        data: *mut c_void,
    );
    fn qemu_plugin_tb_n_insns(block: *const TranslationBlock) -> usize;
    fn qemu_plugin_tb_vaddr(block: *const TranslationBlock) -> u64;
    fn qemu_plugin_tb_get_insn(block: *const TranslationBlock, index: usize) -> *mut Instruction;
    fn qemu_plugin_insn_data(
        instruction: *const Instruction,
        place: *mut c_void,
        length: usize,
    ) -> usize;
    fn qemu_plugin_get_registers() -> *mut Array<Description>;
    fn qemu_plugin_read_register(register: *mut Register, value: *mut Array<u8>) -> c_int;
    fn g_byte_array_new() -> *mut Array<u8>;
    fn g_byte_array_set_size(array: *mut Array<u8>, length: c_uint) -> *mut Array<u8>;
    fn dlsym(library: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// QEMU's variable that names the processor whose turn it is; each thread has one.
const CURRENT: &CStr = c"current_cpu";
/// QEMU's function that finds a processor by its number.
const BY_NUMBER: &CStr = c"qemu_get_cpu";
type ByNumber = unsafe extern "C" fn(c_int) -> *mut c_void;

/// Version of the interface that this plugin uses.
#[no_mangle]
#[allow(unreachable_pub)] // QEMU reaches it by its name.
#[allow(non_upper_case_globals)]
pub static qemu_plugin_version: c_int = 4;

/// Maximum number of processors of the machine.
const PROCESSORS: usize = 4;

/// Present when each block of a module has a counter of its own.
static EACH_BLOCK: OnceLock<Mutex<CountedBlocks>> = OnceLock::new();

/// The output file, and the number of marks in it.
struct Out {
    file: BufWriter<File>,
    marks: u64,
}

static OUT: OnceLock<Mutex<Out>> = OnceLock::new();
static COUNTS: [[AtomicU64; COUNTERS]; PROCESSORS] =
    [const { [const { AtomicU64::new(0) }; COUNTERS] }; PROCESSORS];
/// Other counts of a processor.
static OTHERS: [Others; PROCESSORS] = [const { Others::new() }; PROCESSORS];
/// Number of all executed instructions, which is the machine's time.
static NOW: AtomicU64 = AtomicU64::new(0);
/// Place of [`CURRENT`] in the thread that runs all processors, and the processors.
static TURN: AtomicPtr<*mut c_void> = AtomicPtr::new(std::ptr::null_mut());
static KNOWN: [AtomicPtr<c_void>; PROCESSORS] =
    [const { AtomicPtr::new(std::ptr::null_mut()) }; PROCESSORS];

/// The register with the number of a hypercall, and a buffer for its value.
static NUMBER: AtomicPtr<Register> = AtomicPtr::new(std::ptr::null_mut());
static VALUE: AtomicPtr<Array<u8>> = AtomicPtr::new(std::ptr::null_mut());
/// More than Xen's number of hypercalls; the last one counts all beyond.
const HYPERCALLS: usize = 64;

/// Counts of one processor besides instructions by place.
struct Others {
    /// Hypercalls by their number, and times that the hypervisor had nothing to run.
    hypercalls: [AtomicU64; HYPERCALLS],
    halts: AtomicU64,
    /// Bytes copied, and the copying instructions, which are in no place's count.
    copied: AtomicU64,
    copying: AtomicU64,
    /// Instructions of other processors while this one polled for work, in a domain.
    polled: AtomicU64,
    /// Time at which it gave up its turn during a poll; 0 when it did not.
    paused: AtomicU64,
}

impl Others {
    const fn new() -> Others {
        Others {
            hypercalls: [const { AtomicU64::new(0) }; HYPERCALLS],
            halts: AtomicU64::new(0),
            copied: AtomicU64::new(0),
            copying: AtomicU64::new(0),
            polled: AtomicU64::new(0),
            paused: AtomicU64::new(0),
        }
    }
}

/// Called once by QEMU; `out=FILE` among the arguments names the file of the counters, and `blocks=on`
/// asks for a counter for each block of a module.
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
    let arguments: Vec<String> = (0..usize::try_from(argc).unwrap_or(0))
        .map(|index| {
            // SAFETY: QEMU passes that many strings.
            let text = unsafe { CStr::from_ptr(*argv.add(index)) };
            text.to_string_lossy().into_owned()
        })
        .collect();
    if arguments.iter().any(|text| text == "blocks=on") {
        EACH_BLOCK.get_or_init(|| Mutex::new(CountedBlocks::default()));
    }
    let Some(path) = arguments.iter().find_map(|text| text.strip_prefix("out=")) else {
        eprintln!("bench-plugin: give it the argument out=FILE");
        return 1;
    };
    // SAFETY: both are names.
    let exported = unsafe {
        let found = |name: &CStr| !dlsym(std::ptr::null_mut(), name.as_ptr()).is_null();
        found(CURRENT) && found(BY_NUMBER)
    };
    if !exported {
        eprintln!("bench-plugin: this QEMU does not say which processor runs: it exports no {CURRENT:?} or {BY_NUMBER:?}");
        return 1;
    }
    let file = match File::create(path) {
        Ok(file) => file,
        Err(error) => {
            eprintln!("bench-plugin: cannot write {path}: {error}");
            return 1;
        }
    };
    let file = BufWriter::new(file);
    if OUT.set(Mutex::new(Out { file, marks: 0 })).is_err() {
        eprintln!("bench-plugin: it can be loaded once only");
        return 1;
    }
    // SAFETY: the function has the type that QEMU expects.
    unsafe { qemu_plugin_register_vcpu_tb_trans_cb(id, translated) };
    0
}

/// Adds the effects of a block to the counters of the processor that runs it, each time that it runs. QEMU calls this
/// when it has translated the block.
extern "C" fn translated(_id: u64, block: *mut TranslationBlock) {
    // SAFETY: QEMU passes a block that is valid during this call.
    let (address, count) = unsafe { (qemu_plugin_tb_vaddr(block), qemu_plugin_tb_n_insns(block)) };
    let counter = match EACH_BLOCK.get() {
        Some(blocks) if places::in_kernel(address) => {
            let mut blocks = blocks.lock().unwrap_or_else(PoisonError::into_inner);
            blocks.counter(address)
        }
        _ => places::counter(address),
    };
    if TURN.load(Relaxed).is_null() {
        find_processors();
    }
    let kind = BlockEffects::of(
        (0..count).map(|index| instruction(block, index)),
        places::NAMES.get(counter) != Some(&"xen"),
    );
    let data = std::ptr::without_provenance_mut(kind.pack(counter));
    // SAFETY: as above; `data` is a number that is never used as a pointer.
    unsafe { qemu_plugin_register_vcpu_tb_exec_cb(block, executed, NO_REGISTERS, data) };
    for index in 0..count {
        count_turn(block, index, address);
    }
    if places::NAMES.get(counter) != Some(&"user") {
        return;
    }
    for index in 0..count {
        mark_if_it_is(block, index);
    }
}

/// Returns the first bytes of an instruction, and the number of bytes read.
fn instruction(block: *mut TranslationBlock, index: usize) -> ([u8; MARK.len()], Length) {
    let mut bytes = [0u8; MARK.len()];
    // SAFETY: the index is below the number of instructions, and `bytes` has that length.
    let length = unsafe {
        let instruction = qemu_plugin_tb_get_insn(block, index);
        qemu_plugin_insn_data(instruction, bytes.as_mut_ptr().cast(), bytes.len())
    };
    (bytes, length)
}

/// Lets QEMU count an instruction that calls the hypervisor, or with which the hypervisor halts.
fn count_turn(block: *mut TranslationBlock, index: usize, address: u64) {
    let place = places::NAMES.get(places::counter(address)).copied();
    if matches!(place, Some("user" | "other")) {
        return;
    }
    let turn = Turn::of(instruction(block, index), place == Some("xen"));
    let (callback, flags): (extern "C" fn(c_uint, *mut c_void), c_int) = match turn {
        Some(Turn::Hypercall) => (called, READS_REGISTERS),
        Some(Turn::Halt) => (halted, NO_REGISTERS),
        None => return,
    };
    // SAFETY: the index is below the number of instructions.
    unsafe {
        let instruction = qemu_plugin_tb_get_insn(block, index);
        let nothing = std::ptr::null_mut();
        qemu_plugin_register_vcpu_insn_exec_cb(instruction, callback, flags, nothing);
    }
}

fn mark_if_it_is(block: *mut TranslationBlock, index: usize) {
    if instruction(block, index) != (MARK, MARK.len()) {
        return;
    }
    // SAFETY: the index is below the number of instructions.
    unsafe {
        let instruction = qemu_plugin_tb_get_insn(block, index);
        let nothing = std::ptr::null_mut();
        qemu_plugin_register_vcpu_insn_exec_cb(instruction, marked, NO_REGISTERS, nothing);
    }
}

/// Finds the processors, in the thread that runs them, which is the one that translates.
fn find_processors() {
    // SAFETY: `qemu_plugin_install` has found both. The variable lives as long as this thread, and processors are never
    // removed; the function has had this type since QEMU introduced the numbers.
    unsafe {
        let by_number = dlsym(std::ptr::null_mut(), BY_NUMBER.as_ptr());
        let by_number: ByNumber = std::mem::transmute(by_number);
        for (number, known) in (0..).zip(&KNOWN) {
            known.store(by_number(number), Relaxed);
        }
        let turn = dlsym(std::ptr::null_mut(), CURRENT.as_ptr());
        TURN.store(turn.cast(), Relaxed);
    }
}

/// Returns the number of the processor whose turn it is.
fn processor() -> usize {
    // SAFETY: `find_processors` came before the first block that is executed, in this thread.
    let current = unsafe { *TURN.load(Relaxed) };
    KNOWN
        .iter()
        .position(|known| known.load(Relaxed) == current)
        .unwrap_or(0)
}

/// Adds without a locked instruction: the processors take turns in one thread.
fn add(count: &AtomicU64, more: u64) {
    count.store(count.load(Relaxed) + more, Relaxed);
}

/// Counts a block that is about to run.
extern "C" fn executed(_fixed: c_uint, data: *mut c_void) {
    let (counter, kind) = BlockEffects::unpack(data.addr());
    let processor = processor();
    let (counts, others) = (&COUNTS[processor], &OTHERS[processor]);
    let before = NOW.load(Relaxed);
    let paused = others.paused.load(Relaxed);
    if paused != 0 {
        add(&others.polled, before - paused);
        others.paused.store(0, Relaxed);
    }
    if let Some(count) = counts.get(counter) {
        add(count, kind.instructions);
    }
    if kind.copying != 0 {
        add(&others.copying, kind.copying);
        add(&others.copied, kind.copied);
    }
    let now = before + kind.instructions + kind.copying;
    NOW.store(now, Relaxed);
    if kind.pauses {
        others.paused.store(now, Relaxed);
    }
}

/// Counts a halt of the processor by the hypervisor.
extern "C" fn halted(_fixed: c_uint, _data: *mut c_void) {
    add(&OTHERS[processor()].halts, 1);
}

/// Counts a call of the hypervisor by a kernel.
extern "C" fn called(_fixed: c_uint, _data: *mut c_void) {
    let number = hypercall().unwrap_or(HYPERCALLS).min(HYPERCALLS - 1);
    add(&OTHERS[processor()].hypercalls[number], 1);
}

/// Returns the number of the hypercall that is about to be made.
fn hypercall() -> Option<usize> {
    if NUMBER.load(Relaxed).is_null() {
        find_number();
    }
    let (register, value) = (NUMBER.load(Relaxed), VALUE.load(Relaxed));
    if register.is_null() {
        return None;
    }
    // SAFETY: `find_number` has set both, which live as long as QEMU, and this callback may read registers. QEMU
    // appends the value, least byte first, and the array then has that many bytes.
    unsafe {
        g_byte_array_set_size(value, 0);
        (qemu_plugin_read_register(register, value) > 0).then(|| usize::from(*(*value).data))
    }
}

/// Finds the register of hypercall numbers, in the thread that runs the processors, all of which have equal registers.
fn find_number() {
    // SAFETY: QEMU gives an array of that many descriptions, whose names are strings, and which is never freed.
    unsafe {
        let all = qemu_plugin_get_registers();
        let Some(all) = all.as_ref() else { return };
        let all = std::slice::from_raw_parts(all.data, all.length as usize);
        let is_number = |one: &&Description| CStr::from_ptr(one.name) == c"rax";
        if let Some(found) = all.iter().find(is_number) {
            VALUE.store(g_byte_array_new(), Relaxed);
            NUMBER.store(found.handle, Relaxed);
        }
    }
}

/// Writes the counters when the mark was executed.
extern "C" fn marked(_processor: c_uint, _data: *mut c_void) {
    let Some(out) = OUT.get() else { return };
    if let Err(error) = dump(&mut out.lock().unwrap_or_else(PoisonError::into_inner)) {
        eprintln!("bench-plugin: cannot write the counters: {error}");
    }
}

fn dump(out: &mut Out) -> std::io::Result<()> {
    writeln!(out.file, "mark {}", out.marks)?;
    out.marks += 1;
    for (processor, others) in OTHERS.iter().enumerate() {
        line(out, processor, &others.copied, || "copied".into())?;
        line(out, processor, &others.copying, || "copying".into())?;
        line(out, processor, &others.polled, || "polled".into())?;
        line(out, processor, &others.halts, || "halts".into())?;
        for (number, count) in others.hypercalls.iter().enumerate() {
            line(out, processor, count, || format!("hypercall:{number}"))?;
        }
    }
    for (processor, counts) in COUNTS.iter().enumerate() {
        let (fixed, blocks) = counts.split_at(FIXED);
        for (counter, count) in fixed.iter().enumerate() {
            line(out, processor, count, || places::name(counter))?;
        }
        let Some(known) = EACH_BLOCK.get() else {
            continue;
        };
        let known = known.lock().unwrap_or_else(PoisonError::into_inner);
        for (address, counter) in known.all() {
            if let Some(count) = blocks.get(counter - FIXED) {
                line(out, processor, count, || format!("{address:x}"))?;
            }
        }
    }
    out.file.flush()
}

/// Writes one counter, unless it is 0.
fn line(
    out: &mut Out,
    processor: usize,
    count: &AtomicU64,
    name: impl FnOnce() -> String,
) -> std::io::Result<()> {
    match count.load(Relaxed) {
        0 => Ok(()),
        count => writeln!(out.file, "{processor} {} {count}", name()),
    }
}
