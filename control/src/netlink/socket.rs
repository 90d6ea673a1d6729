//! One request, its acknowledgement or its dump: the transport below [`super::Netlink`].
//!
//! The kernel works a route-netlink request off inside `sendmsg` and has the answer queued when it returns (a dump is produced
//! by the reads), so a blocking socket costs microseconds and serves the daemon's single-threaded runtime, tests and the demo
//! alike. Read `linux/netlink.h` and `Documentation/userspace-api/netlink/intro.rst` first.

use super::error::NetlinkError;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NLMSG_DONE, NLMSG_ERROR, NetlinkHeader, NetlinkMessage, NetlinkPayload,
    ParseableParametrized,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use podgate_runtime::netns::Netns;
use std::io;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// `struct nlmsghdr`.
const HEADER_LEN: usize = 16;
/// `NLM_F_ACK_TLVS`: attributes follow the error (`linux/netlink.h`).
const FLAG_ACK_TLVS: u16 = 0x200;
/// `NLMSGERR_ATTR_MSG`: the kernel's explanation.
const ATTRIBUTE_MESSAGE: u16 = 1;
/// The kernel fills at most 32 KiB of a dump at once, and only as much as the reader offers.
const RECEIVE_LEN: usize = 64 * 1024;
/// A dump that other writers interrupt again and again is taken as it is after this many tries.
const DUMP_TRIES: usize = 8;

pub(super) struct Transport {
    state: Mutex<State>,
}

struct State {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

/// What is being done, for errors.
#[derive(Clone, Copy)]
pub(super) struct Doing<'a> {
    pub(super) operation: &'static str,
    pub(super) object: &'a dyn std::fmt::Display,
}

impl Doing<'_> {
    fn malformed(&self, detail: impl ToString) -> NetlinkError {
        NetlinkError::Malformed { operation: self.operation, object: self.object.to_string(), detail: detail.to_string() }
    }
}

fn socket_error(operation: &'static str) -> impl Fn(io::Error) -> NetlinkError {
    move |source| NetlinkError::Socket { operation, source }
}

/// Opens a route-netlink socket in the namespace `netns`, and subscribes it to `groups`.
pub(super) fn open(netns: &Netns, groups: &[u32]) -> Result<Socket, NetlinkError> {
    let opened = netns.run(bound).and_then(|inner| inner).map_err(socket_error("open one in the namespace"))?;
    settled(opened, groups)
}

fn bound() -> io::Result<Socket> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    Ok(socket)
}

fn settled(socket: Socket, groups: &[u32]) -> Result<Socket, NetlinkError> {
    // Both are conveniences of newer kernels (4.12 and 4.20); without them errors are terser and dumps are filtered here only.
    let _ = socket.set_ext_ack(true).and_then(|()| socket.set_cap_ack(true));
    let _ = socket.set_netlink_get_strict_chk(true);
    for group in groups {
        socket.add_membership(*group).map_err(socket_error("subscribe to changes"))?;
    }
    Ok(socket)
}

impl Transport {
    pub(super) fn open(netns: &Netns) -> Result<Transport, NetlinkError> {
        let socket = open(netns, &[])?;
        Ok(Transport { state: Mutex::new(State { socket, sequence: 0, buffer: Vec::with_capacity(RECEIVE_LEN) }) })
    }

    /// In the calling thread's namespace: to enter one takes a privilege, to look around in one's own does not.
    pub(super) fn here() -> Result<Transport, NetlinkError> {
        let socket = settled(bound().map_err(socket_error("open one"))?, &[])?;
        Ok(Transport { state: Mutex::new(State { socket, sequence: 0, buffer: Vec::with_capacity(RECEIVE_LEN) }) })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic of another holder leaves at worst unread answers of its own sequence number, which are skipped.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sends `message` with `flags` added and waits for the acknowledgement.
    pub(super) fn acknowledged(&self, doing: Doing<'_>, message: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        let mut state = self.lock();
        state.send(message, NLM_F_REQUEST | NLM_F_ACK | flags)?;
        state.answers(doing, &mut |_| {}).map(|_| ())
    }

    /// Sends `message` and gives the one object that answers it.
    pub(super) fn fetched(&self, doing: Doing<'_>, message: RouteNetlinkMessage) -> Result<Option<RouteNetlinkMessage>, NetlinkError> {
        let mut found = None;
        let mut state = self.lock();
        state.send(message, NLM_F_REQUEST | NLM_F_ACK)?;
        state.answers(doing, &mut |answer| found = Some(answer))?;
        Ok(found)
    }

    /// Sends the dump request `message` and gives every object of the answer. Objects that this library cannot parse (of other
    /// people's making: none of ours can be among them) are left out.
    pub(super) fn dumped(&self, doing: Doing<'_>, message: RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, NetlinkError> {
        let mut state = self.lock();
        let mut objects = Vec::new();
        for _ in 0..DUMP_TRIES {
            objects.clear();
            state.send(message.clone(), NLM_F_REQUEST | NLM_F_DUMP)?;
            if let Completeness::Whole = state.answers(doing, &mut |answer| objects.push(answer))? {
                break;
            }
        }
        Ok(objects)
    }
}

/// Whether a dump shows one moment (RFC 3549 says nothing of it; `NLM_F_DUMP_INTR` in `linux/netlink.h` does).
enum Completeness {
    Whole,
    Interrupted,
}

impl State {
    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> Result<(), NetlinkError> {
        self.sequence = self.sequence.wrapping_add(1);
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = self.sequence;
        let mut packet = NetlinkMessage::new(header, NetlinkPayload::from(message));
        packet.finalize();
        let mut bytes = vec![0; packet.buffer_len()];
        packet.serialize(&mut bytes);
        let kernel = SocketAddr::new(0, 0);
        retried(|| self.socket.send_to(&bytes, &kernel, 0)).map_err(socket_error("send a request"))?;
        Ok(())
    }

    /// Reads until the acknowledgement or the end of the dump, handing every object to `take`.
    fn answers(&mut self, doing: Doing<'_>, take: &mut dyn FnMut(RouteNetlinkMessage)) -> Result<Completeness, NetlinkError> {
        let mut completeness = Completeness::Whole;
        loop {
            self.buffer.clear();
            let (socket, buffer) = (&self.socket, &mut self.buffer);
            let (_, from) = retried(|| socket.recv_from(buffer, 0)).map_err(socket_error("receive an answer"))?;
            if from.port_number() != 0 {
                continue; // another process may send to our port: only the kernel is listened to
            }
            for frame in frames(&self.buffer) {
                let frame = frame.map_err(|detail| doing.malformed(detail))?;
                if frame.sequence != self.sequence {
                    continue;
                }
                if frame.flags & NLM_F_DUMP_INTR != 0 {
                    completeness = Completeness::Interrupted;
                }
                match frame.kind {
                    NLMSG_DONE | NLMSG_ERROR => {
                        return match frame.errno() {
                            0 => Ok(completeness),
                            errno => Err(NetlinkError::Refused {
                                operation: doing.operation,
                                object: doing.object.to_string(),
                                errno,
                                message: frame.explanation(),
                            }),
                        };
                    }
                    kind => {
                        if let Ok(object) = RouteNetlinkMessage::parse_with_param(frame.payload, kind) {
                            take(object);
                        }
                    }
                }
            }
        }
    }
}

fn retried<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            other => return other,
        }
    }
}

/// One message of a datagram.
pub(super) struct Frame<'a> {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) sequence: u32,
    pub(super) payload: &'a [u8],
}

impl Frame<'_> {
    /// The errno of an acknowledgement or of a dump's end, positive; 0 is success.
    fn errno(&self) -> i32 {
        self.payload.first_chunk().map_or(0, |code| i32::from_ne_bytes(*code).saturating_neg())
    }

    /// The kernel's text: behind the code and the capped header of the request for an error, behind the code at a dump's end.
    fn explanation(&self) -> Option<String> {
        if self.flags & FLAG_ACK_TLVS == 0 {
            return None;
        }
        let mut rest = self.payload.get(if self.kind == NLMSG_ERROR { 4 + HEADER_LEN } else { 4 }..)?;
        while let Some((head, _)) = rest.split_first_chunk::<4>() {
            let len = usize::from(u16::from_ne_bytes([head[0], head[1]]));
            let value = rest.get(4..len)?;
            if u16::from_ne_bytes([head[2], head[3]]) & 0x3fff == ATTRIBUTE_MESSAGE {
                return Some(String::from_utf8_lossy(value).trim_end_matches('\0').to_owned());
            }
            rest = rest.get(len.next_multiple_of(4)..)?;
        }
        None
    }
}

/// The messages of one datagram.
pub(super) fn frames(mut bytes: &[u8]) -> impl Iterator<Item = Result<Frame<'_>, &'static str>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let (Some(len), Some(kind), Some(flags), Some(sequence)) = (word(bytes, 0), half(bytes, 4), half(bytes, 6), word(bytes, 8)) else {
            bytes = &[];
            return Some(Err("a message header is cut short"));
        };
        let len = len as usize;
        let Some(payload) = bytes.get(HEADER_LEN..len) else {
            bytes = &[];
            return Some(Err("a message is cut short"));
        };
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some(Ok(Frame { kind, flags, sequence, payload }))
    })
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|chunk| u32::from_ne_bytes(*chunk))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|chunk| u16::from_ne_bytes(*chunk))
}
