//! The few socket calls that the standard library and `socket2` lack: options by number, control messages, classic BPF filters.
//!
//! Read first: cmsg(3), socket(7), linux/filter.h.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd};

/// Sets a socket option whose value is a C value without pointers or padding (an int, or an array of such).
pub(crate) fn set_option<T: Plain>(socket: &impl AsFd, level: libc::c_int, name: libc::c_int, value: T) -> io::Result<()> {
    // SAFETY: the kernel reads `size_of::<T>()` bytes from a live value; the descriptor is borrowed.
    let result = unsafe { libc::setsockopt(socket.as_fd().as_raw_fd(), level, name, (&raw const value).cast(), size_of::<T>() as libc::socklen_t) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reads a socket option.
pub(crate) fn option<T: Plain>(socket: &impl AsFd, level: libc::c_int, name: libc::c_int) -> io::Result<T> {
    // SAFETY: every bit pattern is a value of a `Plain` type.
    let mut value: T = unsafe { zeroed() };
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `len` bytes to a live value; the descriptor is borrowed.
    let result = unsafe { libc::getsockopt(socket.as_fd().as_raw_fd(), level, name, (&raw mut value).cast(), &raw mut len) };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// Attaches a classic BPF program: it returns how many bytes of each packet the socket may keep, 0 to refuse it.
pub(crate) fn attach_filter(socket: &impl AsFd, program: &[libc::sock_filter]) -> io::Result<()> {
    let program =
        libc::sock_fprog { len: u16::try_from(program.len()).map_err(|_| io::ErrorKind::InvalidInput)?, filter: program.as_ptr().cast_mut() };
    // SAFETY: the kernel reads `len` instructions from the borrowed slice and copies them; it does not write.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const program).cast(),
            size_of::<libc::sock_fprog>() as libc::socklen_t,
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// What the kernel dropped at a socket: its buffer was full, the checksum wrong, or a filter refused it.
pub(crate) fn socket_drops(socket: &impl AsFd) -> io::Result<u32> {
    // linux/sock_diag.h: SK_MEMINFO_VARS numbers, the last of which is SK_MEMINFO_DROPS.
    let info: [u32; 9] = option(socket, libc::SOL_SOCKET, libc::SO_MEMINFO)?;
    Ok(info[8])
}

/// Receives one datagram into `buffer` without waiting; `None` when there is none. Each of its control messages is shown to `see`.
pub(crate) fn receive(
    socket: &impl AsFd,
    buffer: &mut [u8],
    mut see: impl FnMut(libc::c_int, libc::c_int, &[u8]),
) -> io::Result<Option<(usize, SocketAddr)>> {
    let mut control = Control::EMPTY;
    // SAFETY: these are C structs of integers and pointers; all zeros is a value of each.
    let (mut name, mut header) = unsafe { (zeroed::<libc::sockaddr_storage>(), zeroed::<libc::msghdr>()) };
    let mut iovec = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    header.msg_name = (&raw mut name).cast();
    header.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    header.msg_iov = &raw mut iovec;
    header.msg_iovlen = 1;
    header.msg_control = control.as_mut_ptr();
    header.msg_controllen = size_of::<Control>() as _;
    // SAFETY: the header points to live memory of the lengths it gives, all of it writable.
    let received = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut header, libc::MSG_DONTWAIT) };
    let Ok(len) = usize::try_from(received) else {
        let error = io::Error::last_os_error();
        return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
    };
    if header.msg_flags & libc::MSG_TRUNC != 0 {
        return Err(io::Error::from_raw_os_error(libc::EMSGSIZE));
    }
    // SAFETY: recvmsg has just filled the header, and its control buffer lives to the end of this function.
    for (level, kind, data) in unsafe { control_messages(&header) } {
        see(level, kind, data);
    }
    socket_address(&name).map(|from| Some((len, from))).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// `ret #0`: nothing reaches the socket.
pub(crate) const REFUSE_ALL: [libc::sock_filter; 1] = [libc::sock_filter { code: BPF_RET, jt: 0, jf: 0, k: 0 }];

const BPF_RET: u16 = 0x06;

/// Values that may be read from and written to the kernel byte by byte.
///
/// # Safety
/// Every bit pattern is a value, and there is no padding.
pub(crate) unsafe trait Plain: Copy {}
// SAFETY: integers have neither padding nor invalid patterns.
unsafe impl Plain for libc::c_int {}
// SAFETY: as above.
unsafe impl Plain for u32 {}
// SAFETY: an array of such, without padding between them.
unsafe impl<const N: usize> Plain for [u32; N] {}

/// Room for the control messages of one datagram, aligned as `cmsghdr` must be.
#[derive(Clone, Copy)]
#[repr(C, align(8))]
pub(crate) struct Control {
    bytes: [u8; CONTROL_LEN],
}

/// Enough for three messages of an `in6_pktinfo` or less.
const CONTROL_LEN: usize = 128;

impl Control {
    pub(crate) const EMPTY: Control = Control { bytes: [0; CONTROL_LEN] };

    pub(crate) fn as_mut_ptr(&mut self) -> *mut libc::c_void {
        self.bytes.as_mut_ptr().cast()
    }
}

/// The control messages to be sent with one datagram.
pub(crate) struct ControlWriter<'a> {
    control: &'a mut Control,
    len: usize,
}

impl<'a> ControlWriter<'a> {
    pub(crate) fn new(control: &'a mut Control) -> ControlWriter<'a> {
        ControlWriter { control, len: 0 }
    }

    /// Adds one message. The value's type is the kernel's for this message.
    #[inline]
    pub(crate) fn push<const N: usize>(&mut self, level: libc::c_int, kind: libc::c_int, value: [u8; N]) {
        // SAFETY: these two only compute lengths.
        let (len, space) = unsafe { (libc::CMSG_LEN(N as u32) as usize, libc::CMSG_SPACE(N as u32) as usize) };
        assert!(self.len + space <= CONTROL_LEN, "a datagram has at most three control messages");
        // SAFETY: `self.len` is a sum of CMSG_SPACEs, so the header is aligned as the buffer is, and it and its data lie within the
        // buffer by the assertion above.
        unsafe {
            let header = self.control.bytes.as_mut_ptr().add(self.len).cast::<libc::cmsghdr>();
            (*header).cmsg_len = len as _;
            (*header).cmsg_level = level;
            (*header).cmsg_type = kind;
            libc::CMSG_DATA(header).copy_from_nonoverlapping(value.as_ptr(), N);
        }
        self.len += space;
    }

    /// How many bytes of the buffer are in use.
    pub(crate) fn len(&self) -> usize {
        self.len
    }
}

/// The control messages that came with a datagram: level, type and data.
///
/// # Safety
/// `header` is as recvmsg left it: `msg_control` points to `msg_controllen` readable bytes that live as long as it.
#[inline]
pub(crate) unsafe fn control_messages(header: &libc::msghdr) -> impl Iterator<Item = (libc::c_int, libc::c_int, &[u8])> {
    // SAFETY: by this function's contract.
    let mut at = unsafe { libc::CMSG_FIRSTHDR(header) };
    std::iter::from_fn(move || {
        if at.is_null() {
            return None;
        }
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return only headers that lie within the buffer with their data.
        let message = unsafe {
            let overhead = libc::CMSG_LEN(0) as usize;
            let len = ((*at).cmsg_len as usize).saturating_sub(overhead);
            ((*at).cmsg_level, (*at).cmsg_type, std::slice::from_raw_parts(libc::CMSG_DATA(at).cast_const(), len))
        };
        // SAFETY: `at` is a header within `header`'s buffer.
        at = unsafe { libc::CMSG_NXTHDR(header, at) };
        Some(message)
    })
}

/// The number in a control message: one byte (`IP_TOS`), or an int (everything else that is asked for here).
#[inline]
pub(crate) fn control_number(data: &[u8]) -> Option<libc::c_int> {
    match (data.first_chunk(), data) {
        (Some(bytes), _) => Some(libc::c_int::from_ne_bytes(*bytes)),
        (None, [byte]) => Some(libc::c_int::from(*byte)),
        _ => None,
    }
}

/// The address in a `sockaddr_storage` that the kernel filled.
#[inline]
pub(crate) fn socket_address(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match i32::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: a storage is as large and as aligned as every address type, and any bits are a sockaddr_in.
            let address = unsafe { &*(&raw const *storage).cast::<libc::sockaddr_in>() };
            Some((Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr)), u16::from_be(address.sin_port)).into())
        }
        libc::AF_INET6 => {
            // SAFETY: as above, for sockaddr_in6.
            let address = unsafe { &*(&raw const *storage).cast::<libc::sockaddr_in6>() };
            let (ip, port) = (Ipv6Addr::from(address.sin6_addr.s6_addr), u16::from_be(address.sin6_port));
            Some(SocketAddrV6::new(ip, port, 0, address.sin6_scope_id).into())
        }
        _ => None,
    }
}
