// SPDX-License-Identifier: GPL-2.0-only OR MIT

//! The frontend's directory: what is accepted, what is refused and by which key (H39 to H41), and
//! that each key is read once.

use proptest::prelude::*;
use std::cell::RefCell;
use std::collections::BTreeMap;
use xenbus::proto::frontend::{
    Directory, FrontendRequest, KeyError, KeyFault, Offer, Ring, Unread, MAX_RING_PAGES, VALUE_SIZE,
};
use xenbus::proto::text::Name;
use xenbus::ring::abi::Protocol;

/// A directory that counts how often each key is read.
#[derive(Debug, Default)]
struct CountingDirectory {
    keys: BTreeMap<String, Vec<u8>>,
    reads: RefCell<BTreeMap<String, u32>>,
    /// The key that xenstore does not tell.
    unread: Option<String>,
}

impl CountingDirectory {
    fn new(keys: &[(&str, &str)]) -> Self {
        let mut fake = Self::default();
        for (key, value) in keys {
            fake.set(key, value.as_bytes());
        }
        fake
    }

    /// The keys of a frontend with one page and one queue.
    fn plain() -> Self {
        Self::new(&[
            ("protocol", "x86_64-abi"),
            ("ring-ref", "8"),
            ("event-channel", "15"),
        ])
    }

    fn set(&mut self, key: &str, value: &[u8]) {
        self.keys.insert(key.into(), value.into());
    }

    fn with(mut self, key: &str, value: &str) -> Self {
        self.set(key, value.as_bytes());
        self
    }

    fn without(mut self, key: &str) -> Self {
        self.keys.remove(key);
        self
    }

    /// Reads what the driver reads to connect.
    fn connect(&self, offer: &Offer) -> Result<(FrontendRequest, Vec<Ring>), KeyError> {
        self.reads.borrow_mut().clear();
        let request = FrontendRequest::read(self, offer)?;
        let rings = (0..request.queues)
            .map(|queue| request.ring(self, queue))
            .collect::<Result<_, _>>()?;
        Ok((request, rings))
    }

    fn assert_read_once(&self) {
        for (key, count) in self.reads.borrow().iter() {
            assert_eq!(*count, 1, "{key} was read more than once");
        }
    }

    /// The key and the fault for which the directory is refused.
    fn refusal(&self) -> (String, KeyFault) {
        let error = self.connect(&OFFER).expect_err("it should be refused");
        self.assert_read_once();
        assert!(!error.text().is_empty());
        (error.key.as_str().into(), error.fault)
    }

    fn accepted(&self) -> (FrontendRequest, Vec<Ring>) {
        let connected = self.connect(&OFFER).expect("it should be accepted");
        self.assert_read_once();
        connected
    }

    fn was_read(&self, key: &str) -> bool {
        self.reads.borrow().contains_key(key)
    }
}

impl Directory for CountingDirectory {
    fn read(&self, key: &Name, value: &mut [u8; VALUE_SIZE]) -> Result<Option<usize>, Unread> {
        *self
            .reads
            .borrow_mut()
            .entry(key.as_str().into())
            .or_default() += 1;
        if self.unread.as_deref() == Some(key.as_str()) {
            return Err(Unread);
        }
        let Some(bytes) = self.keys.get(key.as_str()) else {
            return Ok(None);
        };
        for (to, from) in value.iter_mut().zip(bytes) {
            *to = *from;
        }
        Ok(Some(bytes.len()))
    }
}

/// The driver is loaded anew below a frontend that is connected, with smaller parameters.
#[test]
fn a_frontend_keeps_the_queues_and_rings_that_it_was_offered() {
    let mut fake = CountingDirectory::plain()
        .with("multi-queue-num-queues", "2")
        .with("ring-page-order", "1");
    for (queue, key) in
        (0..2).flat_map(|q| ["ring-ref0", "ring-ref1", "event-channel"].map(|k| (q, k)))
    {
        fake.set(&format!("queue-{queue}/{key}"), b"7");
    }
    let small = Offer {
        max_queues: 1,
        max_ring_order: 0,
        ..OFFER
    };
    assert!(fake.connect(&small).is_err());
    let kept = small.with_earlier(Some(2), Some(1), 64);
    let (request, rings) = fake.connect(&kept).unwrap();
    assert_eq!((request.queues, request.order, rings.len()), (2, 1, 2));
    // An earlier driver that offered less, or nothing, takes nothing away, and none makes this one offer what it cannot do.
    assert_eq!(OFFER.with_earlier(Some(1), Some(0), 64), OFFER);
    assert_eq!(OFFER.with_earlier(None, None, 64), OFFER);
    let most = OFFER.with_earlier(Some(u32::MAX), Some(u32::MAX), 64);
    assert_eq!((most.max_queues, most.max_ring_order), (64, 4));
}

const OFFER: Offer = Offer {
    max_queues: 4,
    max_ring_order: 4,
    default_protocol: Protocol::Abi32,
};

/// Values that are no number. The last ones are as long as xenstore allows and longer than what is
/// read of a value.
fn junk() -> Vec<Vec<u8>> {
    let mut junk: Vec<Vec<u8>> = [
        "",
        " ",
        "-1",
        "+1",
        "x",
        "1x",
        "0x1",
        " 1",
        "1 ",
        "1\n",
        "1.0",
        "1\0",
        "\0",
        "\x001",
        "4294967296",
        "99999999999999999999",
        "%u",
        "%n%n%n",
    ]
    .iter()
    .map(|text| text.as_bytes().to_vec())
    .collect();
    junk.push(vec![0xff; 8]);
    junk.push(vec![b'1'; VALUE_SIZE]);
    junk.push(vec![b'0'; VALUE_SIZE + 1]);
    junk.push(vec![b'1'; 4096]);
    junk.push(vec![0; 4096]);
    junk
}

#[test]
fn plain_frontend() {
    let (request, rings) = CountingDirectory::plain().accepted();
    assert_eq!(request.protocol, Protocol::Abi64);
    assert_eq!((request.queues, request.order), (1, 0));
    assert_eq!((request.pages(), request.slots()), (1, 32));
    assert_eq!((rings[0].refs[0], rings[0].port), (8, 15));
    assert_eq!(rings[0].refs[1..], [0; MAX_RING_PAGES - 1]);
}

#[test]
fn protocols() {
    for (name, protocol) in [
        ("x86_64-abi", Protocol::Abi64),
        ("x86_32-abi", Protocol::Abi32),
    ] {
        let (request, _) = CountingDirectory::plain().with("protocol", name).accepted();
        assert_eq!(request.protocol, protocol);
    }
    for default_protocol in [Protocol::Abi32, Protocol::Abi64] {
        let offer = Offer {
            default_protocol,
            ..OFFER
        };
        let (request, _) = CountingDirectory::plain()
            .without("protocol")
            .connect(&offer)
            .unwrap();
        assert_eq!(request.protocol, default_protocol);
    }
    let mut bad = junk();
    for name in [
        "X86_64-ABI",
        "x86_64-abi\0",
        "x86_64-abi ",
        "x86_64",
        "powerpc64-abi",
    ] {
        bad.push(name.as_bytes().into());
    }
    for value in bad {
        let mut fake = CountingDirectory::plain();
        fake.set("protocol", &value);
        assert_eq!(fake.refusal(), ("protocol".into(), KeyFault::Malformed));
    }
}

#[test]
fn absent_is_a_default_or_missing_and_malformed_is_refused() {
    for (key, absent) in [
        ("ring-ref", Some("ring-ref")),
        ("event-channel", Some("event-channel")),
        ("multi-queue-num-queues", None),
        ("ring-page-order", None),
    ] {
        match absent {
            Some(name) => assert_eq!(
                CountingDirectory::plain().without(key).refusal(),
                (name.into(), KeyFault::Missing)
            ),
            None => drop(CountingDirectory::plain().without(key).accepted()),
        }
        for value in junk() {
            let mut fake = CountingDirectory::plain();
            fake.set(key, &value);
            assert_eq!(
                fake.refusal(),
                (key.into(), KeyFault::Malformed),
                "{value:?}"
            );
        }
    }
}

#[test]
fn numbers_of_queues() {
    for (value, fault) in [
        ("0", KeyFault::OutOfRange),
        ("5", KeyFault::OutOfRange),
        ("4294967295", KeyFault::OutOfRange),
        ("4294967296", KeyFault::Malformed),
    ] {
        let fake = CountingDirectory::plain().with("multi-queue-num-queues", value);
        assert_eq!(fake.refusal(), ("multi-queue-num-queues".into(), fault));
    }
    // One queue uses the keys at the top, even if it is announced.
    let (request, _) = CountingDirectory::plain()
        .with("multi-queue-num-queues", "1")
        .accepted();
    assert_eq!(request.queues, 1);
}

#[test]
fn several_queues_have_their_own_keys() {
    let mut fake = CountingDirectory::plain().with("multi-queue-num-queues", "4");
    for queue in 0..4 {
        fake.set(
            &format!("queue-{queue}/ring-ref"),
            format!("10{queue}").as_bytes(),
        );
        fake.set(
            &format!("queue-{queue}/event-channel"),
            format!("20{queue}").as_bytes(),
        );
    }
    let (_, rings) = fake.accepted();
    for (queue, ring) in (0..).zip(&rings) {
        assert_eq!((ring.refs[0], ring.port), (100 + queue, 200 + queue));
    }
    assert!(!fake.was_read("ring-ref") && !fake.was_read("event-channel"));
    let fake = fake.without("queue-3/event-channel");
    assert_eq!(
        fake.refusal(),
        ("queue-3/event-channel".into(), KeyFault::Missing)
    );
}

#[test]
fn ring_orders() {
    for order in 0..=4u32 {
        let mut fake = CountingDirectory::plain()
            .without("ring-ref")
            .with("ring-page-order", &order.to_string());
        for page in 0..1 << order {
            fake.set(
                &format!("ring-ref{page}"),
                (300 + page).to_string().as_bytes(),
            );
        }
        let (request, rings) = fake.accepted();
        assert_eq!(u32::from(request.order), order);
        assert_eq!(request.slots(), 32 << order);
        for page in 0..1 << order {
            assert_eq!(rings[0].refs[page], 300 + page as u32);
        }
        let last = format!("ring-ref{}", (1 << order) - 1);
        let fake = fake.without(&last);
        // A ring of one page may be named either way, so the other name is what is missed.
        let missed = if order == 0 { "ring-ref".into() } else { last };
        assert_eq!(fake.refusal(), (missed, KeyFault::Missing));
    }
    for order in ["5", "31", "32", "256", "4294967295"] {
        let fake = CountingDirectory::plain().with("ring-page-order", order);
        assert_eq!(
            fake.refusal(),
            ("ring-page-order".into(), KeyFault::OutOfRange)
        );
    }
    let offer = Offer {
        max_ring_order: 1,
        ..OFFER
    };
    let error = CountingDirectory::plain()
        .with("ring-page-order", "2")
        .connect(&offer)
        .unwrap_err();
    assert_eq!(error.fault, KeyFault::OutOfRange);
}

#[test]
fn only_ring_page_order_chooses_between_stale_keys() {
    // A boot loader left `ring-ref0`, the driver wrote `ring-ref`.
    let fake = CountingDirectory::plain()
        .with("ring-ref0", "666")
        .with("ring-ref1", "667");
    assert_eq!(fake.accepted().1[0].refs[0], 8);
    // The other way round: `ring-ref` is the stale one.
    let fake = CountingDirectory::plain()
        .with("ring-page-order", "1")
        .with("ring-ref0", "20")
        .with("ring-ref1", "21");
    assert_eq!(fake.accepted().1[0].refs[..2], [20, 21]);
    assert!(!fake.was_read("ring-ref"));
    // And a missing one is not made up from the stale one.
    let fake = fake.without("ring-ref1");
    assert_eq!(fake.refusal(), ("ring-ref1".into(), KeyFault::Missing));
}

#[test]
fn order_zero_may_use_either_name() {
    let fake = CountingDirectory::plain().with("ring-page-order", "0");
    assert_eq!(fake.accepted().1[0].refs[0], 8);
    let fake = fake.with("ring-ref0", "9");
    assert_eq!(fake.accepted().1[0].refs[0], 9);
    // A malformed one is not the same as an absent one.
    let fake = fake.with("ring-ref0", "x");
    assert_eq!(fake.refusal(), ("ring-ref0".into(), KeyFault::Malformed));
}

#[test]
fn event_channel_zero_is_none() {
    let fake = CountingDirectory::plain().with("event-channel", "0");
    assert_eq!(
        fake.refusal(),
        ("event-channel".into(), KeyFault::OutOfRange)
    );
}

#[test]
fn keys_that_mean_nothing_are_not_read() {
    let fake = CountingDirectory::plain()
        .with("feature-large-sector-size", "1")
        .with("num-ring-pages", "16")
        .with("device-type", "cdrom");
    fake.accepted();
    for key in ["feature-large-sector-size", "num-ring-pages", "device-type"] {
        assert!(!fake.was_read(key), "{key}");
    }
}

/// Any value: numbers around the limits, names, bytes, nothing.
fn value() -> impl Strategy<Value = Option<Vec<u8>>> {
    let number = prop_oneof![0..20u64, 0xffff_fff0..0x1_0000_0010u64]
        .prop_map(|number| number.to_string().into_bytes());
    let bytes = proptest::collection::vec(any::<u8>(), 0..100);
    let name = Just(b"x86_64-abi".to_vec());
    prop_oneof![
        2 => Just(None),
        6 => number.prop_map(Some),
        1 => bytes.prop_map(Some),
        1 => name.prop_map(Some),
    ]
}

proptest! {
    #[test]
    fn any_directory_is_read_once_and_judged(
        values in proptest::collection::vec(value(), 24),
        max_queues in 0..6u32,
        max_ring_order in 0..9u8,
    ) {
        let names = ["multi-queue-num-queues", "ring-page-order", "ring-ref", "event-channel"];
        let refs = (0..4).map(|page| format!("ring-ref{page}"));
        let queues = (0..4).flat_map(|queue| {
            ["ring-ref", "ring-ref0", "ring-ref1", "event-channel"]
                .map(|key| format!("queue-{queue}/{key}"))
        });
        let mut fake = CountingDirectory::default();
        for (name, value) in names.map(String::from).into_iter().chain(refs).chain(queues).zip(values) {
            if let Some(value) = value {
                fake.set(&name, &value);
            }
        }
        let offer = Offer { max_queues, max_ring_order, ..OFFER };
        if let Ok((request, rings)) = fake.connect(&offer) {
            prop_assert!((1..=max_queues).contains(&request.queues));
            prop_assert!(request.order <= max_ring_order.min(4));
            prop_assert_eq!(rings.len() as u32, request.queues);
            prop_assert!(rings.iter().all(|ring| ring.port != 0));
            prop_assert!(rings.iter().all(|ring| ring.refs[request.pages()..].iter().all(|gref| *gref == 0)));
        }
        fake.assert_read_once();
    }
}

/// A key that cannot be read is not absent: who says 32 bits must not be served as the default has it.
#[test]
fn a_key_that_cannot_be_read_is_not_absent() {
    let shapes = [
        CountingDirectory::plain(),
        CountingDirectory::plain().with("ring-page-order", "0"),
        CountingDirectory::new(&[
            ("protocol", "x86_32-abi"),
            ("multi-queue-num-queues", "2"),
            ("ring-page-order", "1"),
            ("queue-0/ring-ref0", "8"),
            ("queue-0/ring-ref1", "9"),
            ("queue-0/event-channel", "15"),
            ("queue-1/ring-ref0", "10"),
            ("queue-1/ring-ref1", "11"),
            ("queue-1/event-channel", "16"),
        ]),
    ];
    for mut fake in shapes {
        let _connected = fake.accepted();
        let keys: Vec<String> = fake.reads.borrow().keys().cloned().collect();
        assert!(keys.len() >= 5, "{keys:?}");
        for key in keys {
            fake.unread = Some(key.clone());
            assert_eq!(fake.refusal(), (key, KeyFault::Unread));
        }
    }
}
