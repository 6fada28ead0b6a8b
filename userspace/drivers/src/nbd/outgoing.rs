// SPDX-License-Identifier: MIT OR Apache-2.0
//! Queue of requests to send. All messages that arrive during a send go out with the next call, so a server wakes up
//! once for them.

use super::proto;
use super::wire::Wire;
use diskio::{Bytes, Errno, MessagePart};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::task::{Poll, Waker};

/// Bytes that go with one call, unless one request is larger: small requests gather, and a large one goes alone.
const BATCH: usize = 64 << 10;

/// A request as it is sent.
#[derive(Debug)]
pub(super) struct Message {
    pub(super) cookie: u64,
    pub(super) head: [u8; proto::REQUEST],
    pub(super) payload: Option<Bytes>,
}

impl Message {
    fn parts(&self) -> impl Iterator<Item = MessagePart<'_>> {
        let payload = self.payload.iter().map(MessagePart::Data);
        [MessagePart::Plain(&self.head)].into_iter().chain(payload)
    }

    fn len(&self) -> usize {
        self.parts().map(|part| part.len()).sum()
    }
}

/// Messages that are not sent, in order.
#[derive(Debug, Default)]
pub(super) struct Outgoing {
    queue: RefCell<VecDeque<Message>>,
    /// Bytes of the first one that are sent.
    begun: Cell<usize>,
    /// The last of them is not on its way yet.
    is_busy: Cell<bool>,
    is_closed: Cell<bool>,
    sender: RefCell<Option<Waker>>,
    /// Task that waits until the queue is empty.
    waiter: RefCell<Option<Waker>>,
}

impl Outgoing {
    /// Adds one.
    pub(super) fn push(&self, message: Message) {
        self.queue.borrow_mut().push_back(message);
        wake(&self.sender);
    }

    /// Removes a message of which no byte was sent. Returns false if there is none.
    pub(super) fn withdraw(&self, cookie: u64) -> bool {
        let mut queue = self.queue.borrow_mut();
        let first = usize::from(self.begun.get() > 0);
        let place = queue
            .iter()
            .skip(first)
            .position(|its| its.cookie == cookie);
        place.and_then(|at| queue.remove(first + at)).is_some()
    }

    /// Nothing more is sent.
    pub(super) fn close(&self) {
        self.is_closed.set(true);
        self.queue.borrow_mut().clear();
        wake(&self.sender);
        wake(&self.waiter);
    }

    /// Sends all messages until this is closed or the connection fails. Only one task may call it.
    pub(super) async fn send_all(&self, wire: &Wire) -> Result<(), Errno> {
        while self.is_wanted().await {
            self.is_busy.set(true);
            while !self.queue.borrow().is_empty() {
                wire.when_writable(|wire| self.send_some(wire)).await?;
            }
            wire.send_left().await?;
            self.is_busy.set(false);
            wake(&self.waiter);
        }
        Ok(())
    }

    /// Waits until there is something to send; false if there never will be.
    async fn is_wanted(&self) -> bool {
        poll_fn(|cx| {
            if self.is_closed.get() {
                return Poll::Ready(false);
            }
            if !self.queue.borrow().is_empty() {
                return Poll::Ready(true);
            }
            self.sender.replace(Some(cx.waker().clone()));
            Poll::Pending
        })
        .await
    }

    /// Sends as much as one call takes.
    fn send_some(&self, wire: &Wire) -> Result<(), Errno> {
        let mut queue = self.queue.borrow_mut();
        let parts = batch(&queue).flat_map(Message::parts);
        let sent = wire.send_parts(parts, self.begun.get())?;
        let mut begun = self.begun.get() + sent;
        while let Some(len) = queue.front().map(Message::len).filter(|len| *len <= begun) {
            queue.pop_front();
            begun -= len;
        }
        self.begun.set(begun);
        Ok(())
    }

    /// Waits until all is sent, or nothing more is.
    pub(super) async fn is_sent(&self) {
        poll_fn(|cx| {
            let is_idle = self.queue.borrow().is_empty() && !self.is_busy.get();
            if is_idle || self.is_closed.get() {
                return Poll::Ready(());
            }
            self.waiter.replace(Some(cx.waker().clone()));
            Poll::Pending
        })
        .await;
    }
}

/// The first message, and those behind it for which a call has room.
fn batch(queue: &VecDeque<Message>) -> impl Iterator<Item = &Message> {
    let mut bytes = 0;
    queue.iter().take_while(move |message| {
        let before = bytes;
        bytes += message.len();
        before == 0 || bytes <= BATCH
    })
}

fn wake(waker: &RefCell<Option<Waker>>) {
    let waker = waker.borrow_mut().take();
    if let Some(waker) = waker {
        waker.wake();
    }
}

#[cfg(test)]
mod tests {
    use super::{Message, Outgoing, BATCH};
    use crate::nbd::proto;
    use crate::nbd::wire::Wire;
    use diskio::{Bytes, Errno, Runtime};
    use proptest::prelude::*;
    use rustix::net::{recv, socketpair, AddressFamily, RecvFlags, SocketFlags, SocketType};
    use std::os::fd::OwnedFd;
    use std::rc::Rc;

    /// A task that sends, and the server's end.
    fn started(runtime: &Runtime, kind: SocketType) -> (Rc<Outgoing>, OwnedFd) {
        let family = AddressFamily::UNIX;
        let (ours, server) = socketpair(family, kind, SocketFlags::NONBLOCK, None).unwrap();
        let wire = Wire::new(&runtime.io, ours);
        let outgoing = Rc::new(Outgoing::default());
        let its = outgoing.clone();
        runtime
            .tasks
            .spawn(async move { its.send_all(&wire).await.unwrap() });
        runtime.tasks.run();
        (outgoing, server)
    }

    /// Makes a message whose bytes are its number.
    fn message(cookie: u8, len: usize) -> Message {
        let payload = vec![cookie; len];
        Message {
            cookie: cookie.into(),
            head: [cookie; proto::REQUEST],
            payload: (len > 0).then(|| Bytes::copied(&payload).unwrap()),
        }
    }

    fn received(server: &OwnedFd, most: usize) -> Vec<u8> {
        let mut bytes = vec![0; most];
        match recv(server, &mut *bytes, RecvFlags::empty()) {
            Ok((_, count)) => bytes.truncate(count),
            Err(Errno::AGAIN) => bytes.clear(),
            Err(error) => panic!("{error}"),
        }
        bytes
    }

    #[test]
    fn what_gathers_goes_with_one_call() {
        let runtime = Runtime::new();
        // Messages of one call arrive as one packet.
        let (outgoing, server) = started(&runtime, SocketType::SEQPACKET);
        for cookie in 1..=20 {
            outgoing.push(message(cookie, 512));
        }
        // This message does not fit into the packet.
        outgoing.push(message(21, BATCH));
        assert!(received(&server, 1).is_empty(), "a call for each");
        assert_eq!(outgoing.queue.borrow().len(), 21);
        runtime.tasks.run();
        let packet = || received(&server, 1 << 20).len();
        assert_eq!(packet(), 20 * (512 + proto::REQUEST));
        assert_eq!(packet(), BATCH + proto::REQUEST);
        assert!(outgoing.queue.borrow().is_empty());
    }

    #[test]
    fn who_closes_ends_the_task_and_the_wait_for_it() {
        let runtime = Runtime::new();
        let (outgoing, _server) = started(&runtime, SocketType::STREAM);
        // More than a socket has room for.
        outgoing.push(message(1, 4 << 20));
        runtime.turn(false).unwrap();
        let its = outgoing.clone();
        runtime.tasks.spawn(async move { its.is_sent().await });
        runtime.turn(false).unwrap();
        assert_eq!(runtime.tasks.tasks(), 2);
        outgoing.close();
        runtime.tasks.run();
        assert_eq!(runtime.tasks.tasks(), 1, "who waits is told");
    }

    #[derive(Clone, Debug)]
    enum SendStep {
        Push(usize),
        Withdraw(u8),
        Send,
        Receive(usize),
    }

    fn steps() -> impl Strategy<Value = Vec<SendStep>> {
        let step = prop_oneof![
            prop_oneof![Just(0), 1..5000_usize, 100_000..700_000_usize].prop_map(SendStep::Push),
            (1..40_u8).prop_map(SendStep::Withdraw),
            Just(SendStep::Send),
            (1..400_000_usize).prop_map(SendStep::Receive),
        ];
        prop::collection::vec(step, 1..40)
    }

    proptest! {
        /// A server gets whole messages, in order: all that were not taken back.
        #[test]
        fn messages_arrive_whole_and_in_order(steps in steps()) {
            let runtime = Runtime::new();
            let (outgoing, server) = started(&runtime, SocketType::STREAM);
            let (mut wanted, mut got, mut last) = (Vec::new(), Vec::new(), 0);
            for step in steps {
                match step {
                    SendStep::Push(len) => {
                        last += 1;
                        outgoing.push(message(last, len));
                        wanted.push((last, len + proto::REQUEST));
                    }
                    SendStep::Withdraw(cookie) => {
                        if outgoing.withdraw(cookie.into()) {
                            wanted.retain(|its| its.0 != cookie);
                        }
                    }
                    SendStep::Send => runtime.turn(false).unwrap(),
                    SendStep::Receive(most) => got.extend(received(&server, most)),
                }
            }
            while !outgoing.queue.borrow().is_empty() {
                runtime.turn(false).unwrap();
                got.extend(received(&server, 1 << 20));
            }
            while let bytes @ [_, ..] = &*received(&server, 1 << 20) {
                got.extend(bytes);
            }
            let mut rest = &*got;
            for (cookie, len) in wanted {
                prop_assert!(rest.len() >= len, "{} of {len} bytes of {cookie}", rest.len());
                let (its, behind) = rest.split_at(len);
                prop_assert!(its.iter().all(|byte| *byte == cookie), "not those of {cookie}");
                rest = behind;
            }
            prop_assert!(rest.is_empty());
        }
    }
}
