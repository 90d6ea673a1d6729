//! Messages with descriptors beside them, over Unix sockets that keep messages apart.
//!
//! Read first: unix(7) on `SCM_RIGHTS` and `SCM_CREDENTIALS`, cmsg(3).

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, UCred, recvmsg, sendmsg,
};

/// The most descriptors in one message (`SCM_MAX_FD`, include/net/scm.h).
pub const FDS_MAX: usize = 253;

/// The most bytes of one message.
pub const LEN_MAX: usize = 64 << 10;

/// A message that came.
#[derive(Debug)]
pub struct Message {
    /// Its bytes; none, if it is the end.
    pub bytes: Vec<u8>,
    /// The descriptors beside it.
    pub fds: Vec<OwnedFd>,
    /// Who sent it, where the socket asks (`SO_PASSCRED`).
    pub sender: Option<UCred>,
}

/// Sends a message of at most [`LEN_MAX`] bytes and [`FDS_MAX`] descriptors.
pub fn send(socket: impl AsFd, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut beside = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !beside.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(rustix::io::Errno::TOOBIG);
    }
    sendmsg(socket, &[IoSlice::new(bytes)], &mut beside, SendFlags::NOSIGNAL).map(|_| ())
}

/// The next message. One that was cut is an error: EMSGSIZE; what came of its descriptors is closed.
pub fn receive(socket: impl AsFd) -> rustix::io::Result<Message> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX), ScmCredentials(1))];
    let mut beside = RecvAncillaryBuffer::new(&mut space);
    let mut bytes = vec![0; LEN_MAX];
    let received = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut beside, RecvFlags::CMSG_CLOEXEC)?;
    let (mut fds, mut sender) = (Vec::new(), None);
    for message in beside.drain() {
        match message {
            RecvAncillaryMessage::ScmRights(rights) => fds.extend(rights),
            RecvAncillaryMessage::ScmCredentials(credentials) => sender = Some(credentials),
            _ => {}
        }
    }
    if received.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(rustix::io::Errno::MSGSIZE);
    }
    bytes.truncate(received.bytes);
    Ok(Message { bytes, fds, sender })
}
