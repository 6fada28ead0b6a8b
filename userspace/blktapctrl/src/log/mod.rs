// SPDX-License-Identifier: MIT OR Apache-2.0
//! The log: for the journal, with fields by which it can be searched, or else as text.
//!
//! A line says what it is about by [`About`], which becomes fields of the journal whose names begin with
//! [`PREFIX`]. As text a line is its message alone.

mod about;
mod journal;
mod limit;

pub use about::About;
pub use limit::Limit;

use std::sync::Arc;
use tracing::Subscriber;
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::debug_fn;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::Layer;

/// What the names of our fields in the journal begin with, before an underscore.
pub const PREFIX: &str = "BLKTAP";

/// Writes a line of the log: its level, what it is about (an [`About`]), and its text, perhaps after further
/// fields, as in the macros of `tracing`.
macro_rules! tell {
    ($level:ident, $about:expr, $($text:tt)+) => {{
        let about = $crate::log::About::from($about);
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

/// Says how many lines about a disk, or about none, the [`Limit`] has left out.
pub fn tell_left_out(about: About, count: u64) {
    let of = about
        .minor
        .map_or("no disk".into(), |minor| format!("disk {minor}"));
    tell!(
        warn,
        about,
        suppressed = count,
        "{of}: {count} lines about it were left out of the log, because there were too many; tap-ctl events has what happened"
    );
}

/// From now on lines go to the journal, if it is what reads our standard error, and else there. What one disk may
/// write is limited by what is returned.
#[must_use]
pub fn start(verbose: bool) -> Arc<Limit> {
    let level = match verbose {
        true => LevelFilter::DEBUG,
        false => LevelFilter::INFO,
    };
    let limit = Arc::new(Limit::default());
    let (writer, refused) = match journal::is_our_reader().then(journal::layer) {
        Some(Ok(journal)) => (journal.boxed(), None),
        Some(Err(error)) => (text(), Some(error)),
        None => (text(), None),
    };
    tracing_subscriber::registry()
        .with(writer)
        .with(limit.layer())
        .with(level)
        .init();
    if let Some(error) = refused {
        tracing::warn!("the log is text without fields: the journal does not take it: {error}");
    }
    limit
}

/// Lines as text, without the fields: the message says what a person needs of them.
fn text<S: Subscriber + for<'a> LookupSpan<'a>>() -> Box<dyn Layer<S> + Send + Sync> {
    let message = debug_fn(|writer, field, value| match field.name() {
        "message" => write!(writer, "{value:?}"),
        _ => Ok(()),
    });
    // Who reads it knows the time.
    tracing_subscriber::fmt::layer()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .without_time()
        .fmt_fields(message)
        .boxed()
}
