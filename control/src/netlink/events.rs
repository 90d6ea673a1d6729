//! Changes that anybody makes to a namespace's links, addresses, routes and rules, as they happen.
//!
//! The stream says *what* changed only roughly: whoever listens compares the whole with what it wants (the kernel drops events
//! when a listener is slow, so deltas cannot be trusted; [`Change::Lost`] stands for what was dropped).

use super::NetlinkError;
use super::address::{Address, address_of};
use super::link::{Link, link_of};
use super::route::{Route, route_of};
use super::rule::{Rule, rule_of};
use super::socket::{self, frames};
use netlink_packet_core::ParseableParametrized;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::Socket;
use podgate_runtime::netns::Netns;
use std::io;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `RTNLGRP_LINK`, `_IPV4_IFADDR`, `_IPV4_ROUTE`, `_IPV4_RULE`, `_IPV6_IFADDR`, `_IPV6_ROUTE`, `_IPV6_RULE` (`linux/rtnetlink.h`).
const GROUPS: [u32; 7] = [1, 5, 7, 8, 9, 11, 19];
/// Room for a burst, as of somebody flushing a large table; with less, `Lost` comes sooner.
const RECEIVE_BUFFER: usize = 1 << 20;
const DATAGRAM_LEN: usize = 64 * 1024;

/// Something that changed.
#[derive(Clone, Debug)]
pub enum Change {
    /// A link was made or changed.
    LinkSet(Link),
    /// A link is gone.
    LinkGone(Link),
    /// An interface has a new or changed address.
    AddressSet(Address),
    /// An interface has lost an address.
    AddressGone(Address),
    /// A route was added. Its device is named `ifINDEX`.
    RouteSet(Route),
    /// A route is gone.
    RouteGone(Route),
    /// A rule was added.
    RuleSet(Rule),
    /// A rule is gone.
    RuleGone(Rule),
    /// More changed than the kernel could queue: anything may have.
    Lost,
}

/// The stream of changes in one namespace.
#[derive(Debug)]
pub struct Events {
    socket: AsyncFd<Socket>,
    buffer: Vec<u8>,
}

impl Events {
    /// Listens in the namespace `netns`. Changes from now on are seen, so open it before looking at what there is. Must be
    /// called within a tokio runtime.
    pub fn open(netns: &Netns) -> Result<Events, NetlinkError> {
        let error = |operation| move |source: io::Error| NetlinkError::Socket { operation, source };
        let socket = socket::open(netns, &GROUPS)?;
        socket.set_non_blocking(true).map_err(error("make it non-blocking"))?;
        let _ = socket.set_rx_buf_sz(RECEIVE_BUFFER);
        #[expect(deprecated, reason = "its unsafe successor asks that the descriptor stays ours as long as it is registered: Socket owns it")]
        let socket = AsyncFd::with_interest(socket, Interest::READABLE).map_err(error("watch"))?;
        Ok(Events { socket, buffer: Vec::with_capacity(DATAGRAM_LEN) })
    }

    /// Waits for changes and gives all that are queued. Cancelling it loses nothing that was not received yet.
    pub async fn changes(&mut self) -> Result<Vec<Change>, NetlinkError> {
        let error = |source: io::Error| NetlinkError::Socket { operation: "receive changes", source };
        let mut changes = Vec::new();
        loop {
            let mut ready = self.socket.readable().await.map_err(error)?;
            loop {
                self.buffer.clear();
                match ready.get_inner().recv_from(&mut self.buffer, 0) {
                    Ok((_, from)) if from.port_number() != 0 => {}
                    Ok(_) => changes.extend(changes_in(&self.buffer)),
                    Err(problem) if problem.raw_os_error() == Some(libc::ENOBUFS) => changes.push(Change::Lost),
                    Err(problem) if problem.kind() == io::ErrorKind::Interrupted => {}
                    Err(problem) if problem.kind() == io::ErrorKind::WouldBlock => break,
                    Err(problem) => return Err(error(problem)),
                }
            }
            ready.clear_ready();
            if !changes.is_empty() {
                return Ok(changes);
            }
        }
    }
}

fn changes_in(datagram: &[u8]) -> impl Iterator<Item = Change> {
    frames(datagram).filter_map(|frame| {
        let Ok(frame) = frame else { return Some(Change::Lost) };
        let message = RouteNetlinkMessage::parse_with_param(frame.payload, frame.kind).ok()?;
        change_of(message)
    })
}

fn change_of(message: RouteNetlinkMessage) -> Option<Change> {
    let number = |index| Some(format!("if{index}"));
    match message {
        RouteNetlinkMessage::NewLink(_) => link_of(message).map(Change::LinkSet),
        RouteNetlinkMessage::DelLink(_) => link_of(message).map(Change::LinkGone),
        RouteNetlinkMessage::NewAddress(_) => address_of(message).map(Change::AddressSet),
        RouteNetlinkMessage::DelAddress(_) => address_of(message).map(Change::AddressGone),
        RouteNetlinkMessage::NewRoute(_) => route_of(message, number).map(Change::RouteSet),
        RouteNetlinkMessage::DelRoute(_) => route_of(message, number).map(Change::RouteGone),
        RouteNetlinkMessage::NewRule(_) => rule_of(message).map(Change::RuleSet),
        RouteNetlinkMessage::DelRule(_) => rule_of(message).map(Change::RuleGone),
        _ => None,
    }
}
