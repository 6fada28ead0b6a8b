// SPDX-License-Identifier: MIT OR Apache-2.0
//! Keys, looks and sizes, and what a terminal then shows.

use super::draw::draw;
use super::threads::Event;
use super::{App, End};
use crate::host::xenstore::GuestNames;
use crate::sample::{HostSample, SampledDisk, Supervisor};
use crate::status::fake;
use crate::top::fake::{counted, look};
use ratatui::backend::TestBackend;
use ratatui::buffer::Buffer;
use ratatui::crossterm::event::{Event as Input, KeyCode, KeyEvent, KeyModifiers};
use ratatui::style::Modifier;
use ratatui::Terminal;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

const SECOND: Duration = Duration::from_secs(1);

/// A program and its terminal, at a time that a test says.
struct Shown {
    app: App,
    terminal: Terminal<TestBackend>,
    now: Instant,
    last: Option<HostSample>,
}

impl Shown {
    fn new(width: u16, height: u16) -> Shown {
        let backend = TestBackend::new(width, height);
        Shown {
            app: App::new(2 * SECOND),
            terminal: Terminal::new(backend).expect("a terminal"),
            now: Instant::now(),
            last: None,
        }
    }

    /// With two pictures, the second one of these disks, each of which has read so much more.
    fn with(width: u16, height: u16, disks: Vec<(SampledDisk, u64)>) -> Shown {
        let mut shown = Shown::new(width, height);
        let reads = |disk: &SampledDisk, count| counted(disk.clone(), "rd_req", count);
        let before = disks.iter().map(|(disk, _)| reads(disk, 0)).collect();
        shown.look(before);
        shown.now += 2 * SECOND;
        shown.look(
            disks
                .iter()
                .map(|(disk, count)| reads(disk, *count))
                .collect(),
        );
        shown
    }

    /// A look that comes at once.
    fn look(&mut self, disks: Vec<SampledDisk>) {
        assert!(self.app.begins_look(self.now), "it is not time to look");
        let mut look = look(0, None, disks);
        look.at = self.now;
        self.last = Some(look.clone());
        self.event(Event::Look(Box::new(look)));
    }

    /// Whether the program continues.
    fn event(&mut self, event: Event) -> bool {
        match self.app.event(event) {
            ControlFlow::Continue(()) => true,
            ControlFlow::Break(end) => {
                assert!(matches!(end, Ok(End::Key)), "it has ended otherwise");
                false
            }
        }
    }

    fn key(&mut self, code: KeyCode) -> bool {
        let key = KeyEvent::new(code, KeyModifiers::NONE);
        self.event(Event::Terminal(Input::Key(key)))
    }

    fn keys(&mut self, keys: &str) {
        for key in keys.chars() {
            assert!(self.key(KeyCode::Char(key)), "{key} ends it");
        }
    }

    fn draw(&mut self) -> &Buffer {
        let (app, now) = (&mut self.app, self.now);
        let drawn = self.terminal.draw(|frame| draw(frame, app, now));
        drawn.expect("drawn");
        self.terminal.backend().buffer()
    }

    /// The lines on the terminal.
    fn lines(&mut self) -> Vec<String> {
        let buffer = self.draw();
        let lines = buffer.content.chunks(buffer.area.width.into());
        lines
            .map(|line| line.iter().map(|cell| cell.symbol()).collect())
            .collect()
    }

    fn text(&mut self) -> String {
        self.lines().join("\n")
    }

    /// The first line that has a word.
    fn line(&mut self, word: &str) -> Option<String> {
        self.lines().into_iter().find(|line| line.contains(word))
    }

    /// Returns the first word of each row of the table.
    fn guests(&mut self) -> Vec<String> {
        let lines = self.lines().into_iter();
        let mut below = lines.skip_while(|line| !line.trim_start().starts_with("GUEST"));
        below.next();
        let first = below.map(|line| line.split_whitespace().next().map(str::to_owned));
        first
            .map_while(|word| word.filter(|word| word.parse::<u32>().is_ok()))
            .collect()
    }

    /// The guest of the row that is marked as selected.
    fn selected(&mut self) -> Option<String> {
        let buffer = self.draw();
        let width = usize::from(buffer.area.width);
        let is_marked = |line: &&[ratatui::buffer::Cell]| {
            line.iter().all(|cell| cell.modifier == Modifier::REVERSED)
        };
        let mut lines = buffer.content.chunks(width);
        let line = lines.find(is_marked)?;
        let text: String = line.iter().map(|cell| cell.symbol()).collect();
        text.split_whitespace().next().map(str::to_owned)
    }

    /// The headings that are marked as those sorted by.
    fn marked(&mut self) -> String {
        let buffer = self.draw();
        let marked = Modifier::REVERSED | Modifier::BOLD;
        let cells = buffer.content.iter();
        let marked = cells.filter(|cell| cell.modifier == marked);
        marked.map(|cell| cell.symbol()).collect::<String>()
    }
}

/// A disk of the kernel's of this guest, on this device.
fn disk(guest: u32, device: &str) -> SampledDisk {
    let mut disk = fake::phy();
    if let Some(vbd) = &mut disk.vbd {
        vbd.guest = guest;
        vbd.path = format!("backend/vbd/{guest}/51712");
    }
    if let Some(block) = &mut disk.block {
        block.name = device.into();
    }
    disk.name_guest(&GuestNames::default());
    disk
}

fn three() -> Vec<(SampledDisk, u64)> {
    vec![
        (disk(1, "sda"), 100),
        (disk(2, "sdb"), 300),
        (disk(3, "dm-7"), 200),
    ]
}

#[test]
fn the_host_and_the_busiest_disk_come_first() {
    let mut shown = Shown::with(100, 12, three());
    assert_eq!(shown.guests(), ["2", "3", "1"]);
    let text = shown.text();
    assert!(text.contains("3 disks, every 2 s"), "{text}");
    assert!(text.contains("in 2.0 s: 300.0 reads/s ("), "{text}");
    assert!(text.contains("blktapctrl answers"), "{text}");
    let marked = shown.marked();
    assert_eq!(
        marked.split_whitespace().collect::<Vec<_>>(),
        ["READ/s", "WRITE/s"]
    );
}

#[test]
fn keys_sort_and_the_order_is_marked_and_turned_round() {
    let mut shown = Shown::with(100, 12, three());
    shown.keys("T");
    assert_eq!(shown.guests(), ["3", "1", "2"]);
    assert_eq!(shown.marked().trim(), "TARGET");
    shown.keys("r");
    assert_eq!(shown.guests(), ["2", "1", "3"]);
    assert!(shown.line("sorted by TARGET, the largest first").is_some());
    // The next column after the last one is the load, and then the first.
    shown.keys(">");
    assert_eq!(shown.guests(), ["2", "3", "1"]);
    shown.key(KeyCode::Right);
    assert_eq!(
        (shown.guests(), shown.marked().trim()),
        (vec!["1".into(), "2".into(), "3".into()], "GUEST")
    );
    shown.key(KeyCode::Left);
    shown.keys("<r");
    assert_eq!(shown.marked().trim(), "TARGET");
    shown.keys("A");
    assert_eq!(shown.guests(), ["2", "3", "1"]);
}

/// Also by a column for which there is no room otherwise.
#[test]
fn what_has_no_figure_is_last_in_either_order() {
    let mut disks = three();
    disks[1].0 = counted(disks[1].0.clone(), "memory_kib", 700);
    disks[2].0 = counted(disks[2].0.clone(), "memory_kib", 900);
    let mut shown = Shown::with(60, 12, disks);
    assert!(shown.line("MEM KiB").is_none());
    shown.keys("M");
    assert_eq!(shown.guests(), ["3", "2", "1"]);
    assert_eq!(shown.marked().trim(), "MEM KiB");
    shown.keys("r");
    assert_eq!(shown.guests(), ["2", "3", "1"]);
}

#[test]
fn a_filter_chooses_by_guest_or_target_while_it_is_typed() {
    let mut shown = Shown::with(100, 12, three());
    shown.keys("/S");
    assert_eq!(shown.guests(), ["2", "1"]);
    assert!(shown.line("guest or part of a target: S_").is_some());
    // Letters of other keys are the filter's.
    shown.keys("q");
    assert_eq!(shown.guests(), Vec::<String>::new());
    assert!(shown.line("no disk is like that").is_some());
    shown.key(KeyCode::Backspace);
    shown.keys("db");
    shown.key(KeyCode::Enter);
    assert_eq!(shown.guests(), ["2"]);
    assert!(shown.line("1 of 3 disks (guest or target `Sdb`)").is_some());
    assert!(shown.key(KeyCode::Esc), "a filter is taken away first");
    assert_eq!(shown.guests().len(), 3);
    shown.keys("/3");
    assert_eq!(shown.guests(), ["3"]);
    assert!(shown.key(KeyCode::Esc) && shown.guests().len() == 3);
    assert!(!shown.key(KeyCode::Esc));
}

#[test]
fn the_selected_disk_is_followed_and_one_takes_its_place() {
    let mut shown = Shown::with(100, 12, three());
    assert_eq!(shown.selected().as_deref(), Some("2"));
    shown.keys("j");
    assert_eq!(shown.selected().as_deref(), Some("3"));
    shown.keys("G");
    assert_eq!(
        (shown.guests()[2].as_str(), shown.selected().as_deref()),
        ("3", Some("3"))
    );
    shown.keys("k");
    assert_eq!(shown.selected().as_deref(), Some("2"));
    // It goes, and the one below comes up.
    shown.now += 2 * SECOND;
    shown.look(vec![disk(1, "sda"), disk(3, "dm-7")]);
    assert_eq!(shown.selected().as_deref(), Some("3"));
    shown.now += 2 * SECOND;
    shown.look(Vec::new());
    assert_eq!(shown.selected(), None);
    assert!(shown.line("no guest has a disk here").is_some());
}

#[test]
fn whoever_is_on_top_stays_there() {
    let mut shown = Shown::with(100, 12, three());
    shown.keys("jk");
    shown.keys("G");
    assert_eq!(shown.selected().as_deref(), Some("1"));
}

#[test]
fn five_hundred_disks_are_gone_through_by_pages() {
    let disks = (1..=500).map(|guest| (disk(guest, "sda"), 0)).collect();
    let mut shown = Shown::with(100, 24, disks);
    let page = shown.guests().len();
    assert_eq!(page, 19, "{}", shown.text());
    shown.key(KeyCode::PageDown);
    assert_eq!(shown.selected(), Some((page + 1).to_string()));
    assert_eq!(shown.guests()[0], "2");
    shown.key(KeyCode::End);
    assert_eq!(shown.selected().as_deref(), Some("500"));
    assert_eq!(shown.guests().last().map(String::as_str), Some("500"));
    shown.keys("j");
    assert_eq!(shown.selected().as_deref(), Some("500"));
    shown.key(KeyCode::PageUp);
    assert_eq!(shown.selected(), Some((500 - page).to_string()));
    shown.key(KeyCode::Home);
    assert_eq!(
        (shown.guests()[0].as_str(), shown.selected().as_deref()),
        ("1", Some("1"))
    );
    // The selected disk stays visible in a smaller window.
    shown.key(KeyCode::End);
    shown.terminal.backend_mut().resize(100, 10);
    assert_eq!(shown.selected().as_deref(), Some("500"));
}

/// In all sizes that there may be for a moment, in all places.
#[test]
fn no_size_is_too_small() {
    let disks = (1..=500).map(|guest| (disk(guest, "sda"), 0)).collect();
    let mut shown = Shown::with(100, 24, disks);
    shown.key(KeyCode::End);
    for place in [
        KeyCode::Home,
        KeyCode::Enter,
        KeyCode::Esc,
        KeyCode::Char('?'),
        KeyCode::Esc,
        KeyCode::Char('/'),
    ] {
        shown.key(place);
        for (width, height) in [
            (0, 0),
            (1, 1),
            (1, 24),
            (100, 1),
            (2, 2),
            (3, 3),
            (5, 4),
            (7, 5),
            (300, 100),
        ] {
            shown.terminal.backend_mut().resize(width, height);
            shown.draw();
            shown.key(KeyCode::PageDown);
            shown.key(KeyCode::Up);
            shown.draw();
        }
    }
    shown.key(KeyCode::Esc);
    shown.terminal.backend_mut().resize(8, 2);
    assert_eq!(shown.lines(), ["VDEV    ", "xvda    "]);
}

#[test]
fn a_narrow_terminal_has_the_columns_that_are_wanted_most() {
    let titles = |width| {
        let mut shown = Shown::with(width, 12, three());
        let line = shown.line("VDEV").expect("headings");
        line.split_whitespace()
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    let narrow = [
        "GUEST", "VDEV", "STATE", "READ/s", "WRITE/s", "rMiB/s", "wMiB/s", "TARGET",
    ];
    assert_eq!(titles(80), narrow);
    assert_eq!(titles(40), ["GUEST", "VDEV", "READ/s", "WRITE/s"]);
    // MEM KiB is two words.
    assert_eq!(titles(200).len(), 20);
}

#[test]
fn details_have_all_figures_and_what_status_says() {
    let mut disks = three();
    // It has requests, and answers none of them for as long as it takes to call it hung.
    if let Some(block) = &mut disks[1].0.block {
        block.in_flight = 4;
        block.is_suspended = true;
    }
    let held = disks[1].0.clone();
    let mut shown = Shown::with(100, 60, disks);
    for _ in 0..3 {
        shown.now += 2 * SECOND;
        shown.look(vec![held.clone()]);
    }
    shown.key(KeyCode::Enter);
    let text = shown.text();
    assert!(text.contains("hung oldest>"), "{text}");
    assert!(text.contains("do: dmsetup resume"), "{text}");
    assert!(
        text.contains("BUSY                                  4  requests that"),
        "{text}"
    );
    assert!(
        text.contains("counted by xen-blkback-rs of backend/vbd/2/51712"),
        "{text}"
    );
    assert!(text.contains("and it is suspended"), "{text}");
    // It goes, and comes again.
    shown.now += 2 * SECOND;
    shown.look(Vec::new());
    assert!(shown.line("the disk has gone").is_some());
    shown.now += 2 * SECOND;
    shown.look(vec![held]);
    assert!(shown.line("hung").is_some());
    assert!(shown.key(KeyCode::Esc));
    assert_eq!(shown.guests(), ["2"]);
}

#[test]
fn details_of_a_process_are_its_counters_too_and_can_be_read_to_their_end() {
    let mut tap = fake::tap(0);
    fake::stats(&mut tap).driver.insert("clusters".into(), 4711);
    let mut shown = Shown::with(80, 12, vec![(tap, 0)]);
    shown.keys("d");
    assert!(shown.line("clusters").is_none());
    let mut seen = String::new();
    for _ in 0..100 {
        seen += &shown.text();
        shown.keys("j");
    }
    assert!(
        seen.contains("clusters=4711") && seen.contains("PID"),
        "{seen}"
    );
    shown.key(KeyCode::Home);
    assert!(shown.line("clusters").is_none());
}

#[test]
fn help_names_every_column_with_its_key() {
    let mut shown = Shown::with(100, 60, three());
    shown.keys("?");
    let text = shown.text();
    for words in [
        "turn the order round",
        "X RDms",
        "T TARGET",
        "A READ/s + WRITE/s",
    ] {
        assert!(text.contains(words), "{words}: {text}");
    }
    shown.key(KeyCode::Esc);
    assert_eq!(shown.guests().len(), 3);
}

#[test]
fn a_look_that_does_not_come_back_leaves_the_picture_and_the_keys() {
    let mut shown = Shown::with(100, 12, three());
    shown.now += SECOND;
    assert!(
        !shown.app.begins_look(shown.now),
        "it looks before the interval is over"
    );
    shown.now += SECOND;
    assert!(shown.app.begins_look(shown.now));
    for _ in 0..30 {
        shown.now += SECOND;
        assert!(
            !shown.app.begins_look(shown.now),
            "it looks while it is looking"
        );
        assert_eq!(shown.app.patience(shown.now), SECOND);
    }
    assert!(
        shown.line("this picture is 32 s old: for 30 s").is_some(),
        "{}",
        shown.text()
    );
    assert_eq!(shown.guests(), ["2", "3", "1"]);
    shown.keys("T");
    assert_eq!(shown.guests(), ["3", "1", "2"]);
    assert!(!shown.key(KeyCode::Char('q')));
}

#[test]
fn the_first_look_may_hang_as_well() {
    let mut shown = Shown::new(100, 12);
    assert!(shown.app.begins_look(shown.now));
    assert!(shown.line("looking at this host").is_some());
    shown.now += 7 * SECOND;
    assert!(
        shown.line("there is no picture yet: for 7 s").is_some(),
        "{}",
        shown.text()
    );
    shown.key(KeyCode::Enter);
    shown.keys("jr/ab");
    let key = KeyEvent::new(KeyCode::Char('c'), KeyModifiers::CONTROL);
    assert!(!shown.event(Event::Terminal(Input::Key(key))));
}

#[test]
fn a_pause_keeps_the_picture() {
    let mut shown = Shown::with(100, 12, three());
    shown.now += 2 * SECOND;
    assert!(shown.app.begins_look(shown.now));
    shown.keys(" ");
    // The answer to a question from before the pause arrives during it.
    let late = shown.last.clone().expect("a look");
    let now = shown.now;
    let mut empty = HostSample { at: now, ..late };
    empty.disks.clear();
    shown.event(Event::Look(Box::new(empty)));
    shown.now += 5 * SECOND;
    assert!(!shown.app.begins_look(shown.now));
    assert_eq!(shown.guests(), ["2", "3", "1"]);
    assert!(
        shown.line("paused, this picture is 7 s old").is_some(),
        "{}",
        shown.text()
    );
    shown.keys(" ");
    assert!(shown.app.begins_look(shown.now));
}

#[test]
fn the_interval_is_changed() {
    let mut shown = Shown::with(100, 12, three());
    shown.keys("++-+");
    assert!(shown.line("every 4 s").is_some());
    shown.now += 2 * SECOND;
    assert!(!shown.app.begins_look(shown.now));
    assert_eq!(shown.app.patience(shown.now), SECOND);
    shown.keys("-----");
    assert!(shown.line("every 1 s").is_some());
    assert_eq!(shown.app.patience(shown.now), Duration::ZERO);
    assert!(shown.app.begins_look(shown.now));
}

#[test]
fn a_supervisor_that_is_silent_is_told() {
    let mut shown = Shown::with(100, 12, three());
    let mut look = shown.last.clone().expect("a look");
    look.supervisor = Supervisor::Silent("no such file".into());
    shown.event(Event::Look(Box::new(look)));
    assert!(shown
        .line("blktapctrl does not answer, so processes are not shown: no such")
        .is_some());
}

#[test]
fn signals_and_threads_that_end_end_it() {
    let mut app = App::new(SECOND);
    let end = app.event(Event::Signal(15));
    assert!(matches!(end, ControlFlow::Break(Ok(End::Signal(15)))));
    let (thread, why) = ("looks", "it has panicked".to_owned());
    let end = app.event(Event::Ended { thread, why });
    assert!(matches!(end, ControlFlow::Break(Err(_))));
}
