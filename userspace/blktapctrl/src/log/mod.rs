// SPDX-License-Identifier: MIT OR Apache-2.0
//! The log: for the journal, with fields by which it can be searched, or else as text.
//!
//! A line says what it is about by [`LogContext`], which becomes fields of the journal whose names begin with
//! [`PREFIX`]. As text a line is its level and its message.
//!
//! A reader of the log may stop reading, as a journald does whose storage hangs. Lines wait for it in a queue of limited
//! size, from which a thread of its own takes them; those that find no room are counted.

mod context;
mod journal;
mod limit;
mod lines;
mod queue;

pub use context::LogContext;
pub use limit::LineLimit;

use journal::JournalSocket;
use lines::{LineFormat, LogLine};
use queue::{LineQueue, QueueItem};
use std::io::{self, Write};
use std::sync::Arc;
use std::time::Duration;
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::Layer;

/// Prefix of the names of our fields in the journal, before an underscore.
pub const PREFIX: &str = "BLKTAP";

/// Writes a line of the log: its level, what it is about (an [`LogContext`]), and its text, perhaps after further
/// fields, as in the macros of `tracing`.
macro_rules! tell {
    ($level:ident, $about:expr, $($text:tt)+) => {{
        let about = $crate::log::LogContext::from($about);
        tracing::$level!(
            minor = about.minor,
            domid = about.domid,
            guest = about.guest.as_deref(),
            vdev = about.vdev.as_deref(),
            target = about.target.as_deref(),
            pid = about.pid,
            errno = about.errno,
            event = about.event.as_deref(),
            number = about.number,
            $($text)+
        )
    }};
}
pub(crate) use tell;

/// Says how many lines about a disk, or about none, the [`LineLimit`] has left out.
pub fn tell_left_out(about: LogContext, count: u64) {
    let of = about
        .minor
        .map_or("no disk".into(), |minor| format!("disk {minor}"));
    tell!(
        warn,
        about,
        suppressed = count,
        "{of}: {count} lines about it were left out of the log, because there were too many; `tap-ctl events --after 0` has what happened"
    );
}

/// How long the end of the program waits for its last lines to be read.
const PARTING: Duration = Duration::from_secs(2);
/// Bytes of the stack of the thread that writes.
const STACK: usize = 256 << 10;

/// The log of this program, which lasts as long as the program does.
#[must_use]
#[derive(Debug)]
pub struct Log {
    /// Limit of each disk.
    pub limit: Arc<LineLimit>,
    queue: Arc<LineQueue>,
}

impl Drop for Log {
    /// Waits for the reader to take the last lines, which may say why the program ends, but not for ever.
    fn drop(&mut self) {
        // Lines that it has not taken by then are lost with the program, and so is their number.
        let _ = self.queue.is_empty_within(PARTING);
    }
}

/// Destination of the lines.
enum Reader {
    Journal(JournalSocket),
    Stderr,
}

impl Reader {
    fn form(&self) -> LineFormat {
        match self {
            Reader::Journal(_) => LineFormat::Journal,
            Reader::Stderr => LineFormat::Text,
        }
    }

    fn write(&self, line: &[u8]) -> io::Result<()> {
        match self {
            Reader::Journal(journal) => journal.send(line),
            Reader::Stderr => io::stderr().write_all(line),
        }
    }
}

/// From now on lines go to the journal, if it is what reads our standard error, and else there. A thread of its own
/// writes them: writing a line never waits for its reader.
///
/// # Errors
/// The system gives no thread.
pub fn start(verbose: bool) -> io::Result<Log> {
    let level = match verbose {
        true => LevelFilter::DEBUG,
        false => LevelFilter::INFO,
    };
    let limit = Arc::new(LineLimit::default());
    let queue = Arc::<LineQueue>::default();
    let (reader, refused) = match journal::is_our_reader().then(JournalSocket::find) {
        Some(Ok(journal)) => (Reader::Journal(journal), None),
        Some(Err(error)) => (Reader::Stderr, Some(error)),
        None => (Reader::Stderr, None),
    };
    let form = reader.form();
    let (lines, counts) = (queue.clone(), limit.clone());
    let thread = std::thread::Builder::new().name("log".into());
    thread.stack_size(STACK).spawn(move || {
        let mut missing = 0;
        loop {
            give_next(&lines, &counts, form, &mut missing, |line| {
                reader.write(line)
            });
        }
    })?;
    let writer = Writer {
        queue: queue.clone(),
        limit: limit.clone(),
        form,
    };
    tracing_subscriber::registry()
        .with(writer)
        .with(limit.layer())
        .with(level)
        .init();
    // Rust's own hook would wait for whoever reads standard error.
    std::panic::set_hook(Box::new(|panic| tracing::error!("{panic}")));
    if let Some(error) = refused {
        tracing::warn!("the log is text without fields: the journal does not take it: {error}");
    }
    Ok(Log { limit, queue })
}

/// Gives the next line to the reader, and tells it of those that are missing before.
fn give_next(
    queue: &LineQueue,
    limit: &LineLimit,
    form: LineFormat,
    missing: &mut u64,
    write: impl Fn(&[u8]) -> io::Result<()>,
) {
    let item = queue.take();
    if let QueueItem::Lost(count) = &item {
        *missing = missing.saturating_add(*count);
    }
    // Their number is kept until the reader takes it.
    if *missing > 0 && write(&LogLine::lost(*missing).encoded(form)).is_ok() {
        *missing = 0;
    }
    if let QueueItem::Line(line) = item {
        if write(&line).is_err() {
            limit.lose();
            *missing = missing.saturating_add(1);
        }
    }
    queue.written();
}

/// The part of a subscriber that hands lines to the thread that writes them.
struct Writer {
    queue: Arc<LineQueue>,
    limit: Arc<LineLimit>,
    form: LineFormat,
}

impl<S: Subscriber> Layer<S> for Writer {
    fn on_event(&self, event: &Event<'_>, _context: Context<'_, S>) {
        if !self.queue.put(LogLine::of(event).encoded(self.form)) {
            self.limit.lose();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{give_next, LineFormat, LineLimit, LineQueue};
    use std::cell::RefCell;
    use std::io;

    #[test]
    fn lines_that_the_reader_refuses_are_counted_and_told_when_it_takes_one() {
        let (queue, limit) = (LineQueue::default(), LineLimit::default());
        let (mut missing, taken) = (0, RefCell::new(Vec::new()));
        for line in ["1\n", "2\n", "3\n"] {
            assert!(queue.put(line.into()));
        }
        for _ in 0..2 {
            give_next(&queue, &limit, LineFormat::Text, &mut missing, |_| {
                Err(io::ErrorKind::BrokenPipe.into())
            });
        }
        assert_eq!((missing, limit.suppressed()), (2, 2));
        give_next(&queue, &limit, LineFormat::Text, &mut missing, |line| {
            taken.borrow_mut().extend_from_slice(line);
            Ok(())
        });
        let text = String::from_utf8(taken.take()).expect("text");
        assert!(
            text.starts_with(" WARN 2 lines were left out of the log"),
            "{text}"
        );
        assert!(text.ends_with("\n3\n"), "{text}");
        assert_eq!((missing, limit.suppressed()), (0, 2));
    }
}
