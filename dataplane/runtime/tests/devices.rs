//! Real streams through real devices: two namespaces, a TUN in each, and a relay that carries frames from one to the other as the
//! gateway's workers do, with a `virtio_net_hdr` made anew from what `parse` finds.
//!
//! Skipped, with the reason printed, where namespaces or TUN devices are not permitted.

use std::io::{IoSlice, Read, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use podgate_core::packet::{Checksum, Gso, Ingress, Offload, Packet};
use podgate_core::parse::parse;
use podgate_runtime::netns::Netns;
use podgate_runtime::tun::{Feature, Queue, Tun};
use podgate_runtime::udp::{RECEIVE_LEN_MAX, Receiver, Sender};
use podgate_runtime::vnet::{VNET_HEADER_LEN, VnetHeader};
use tun::AbstractDevice;

/// A namespace with a TUN and addresses of both families on it.
struct Side {
    netns: Netns,
    tun: Tun,
    v4: IpAddr,
    v6: IpAddr,
}

/// What the relay saw.
#[derive(Debug, Default)]
struct Seen {
    len_max: usize,
    tcp_superframes: usize,
    udp_superframes: usize,
    partial: usize,
}

fn side(number: u8) -> Result<Side, Box<dyn std::error::Error>> {
    let netns = Netns::anonymous()?;
    let mut tun = Tun::open("pg0", 1, &netns)?;
    let (v4, v6) = (IpAddr::from([10, 9, 0, number]), Ipv6Addr::from([0xfd00, 0, 0, 0, 0, 0, 0, number.into()]));
    tun.set_mtu(1500)?;
    netns.run(|| {
        let mut config = tun::Configuration::default();
        config.tun_name("pg0").raw_fd(tun.queues[0].as_raw_fd()).close_fd_on_drop(false);
        let mut device = tun::create(&config).expect("a control socket");
        device.set_address(v4).expect("an address");
        device.set_netmask("255.255.255.0".parse().expect("a mask")).expect("a netmask");
        let index = device.tun_index().expect("an index");
        add_v6(v6, index);
    })?;
    tun.bring_up()?;
    netns.run(|| wait_usable(v6))?;
    Ok(Side { netns, tun, v4, v6: v6.into() })
}

/// ipv6(7): `SIOCSIFADDR` on an IPv6 socket.
fn add_v6(address: Ipv6Addr, index: i32) {
    let socket = std::net::UdpSocket::bind("[::]:0").expect("an IPv6 socket");
    let request = libc::in6_ifreq { ifr6_addr: libc::in6_addr { s6_addr: address.octets() }, ifr6_prefixlen: 64, ifr6_ifindex: index };
    // SAFETY: the kernel reads one in6_ifreq from a live value.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR as _, &raw const request) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
}

/// The kernel makes an address usable by a work item of its own (`addrconf_dad_work` in net/ipv6/addrconf.c), a moment after it was added.
fn wait_usable(address: Ipv6Addr) {
    let start = Instant::now();
    while let Err(error) = std::net::UdpSocket::bind((address, 0)) {
        assert!(start.elapsed() < Duration::from_secs(5), "{address}: {error}");
        thread::yield_now();
    }
}

fn two_sides() -> Option<(Side, Side)> {
    side(1).and_then(|one| Ok((one, side(2)?))).inspect_err(|error| eprintln!("skipped: {error}")).ok()
}

/// Carries frames both ways until `stop` is closed.
fn relay(one: &Queue, other: &Queue, stop: impl AsFd) -> Seen {
    let mut seen = Seen::default();
    let mut buffer = vec![0; 70_000];
    loop {
        let mut polled = [one.as_fd(), other.as_fd(), stop.as_fd()].map(|fd| PollFd::new(fd, PollFlags::POLLIN));
        poll(&mut polled, PollTimeout::NONE).unwrap();
        if polled[2].any() == Some(true) {
            return seen;
        }
        for (from, to) in [(one, other), (other, one)] {
            while let Some((len, offload)) = from.read(&mut buffer).unwrap() {
                let packet = Packet { head: &mut buffer[VNET_HEADER_LEN..][..len], tail_len: 0, offload, ingress: Ingress::Pods };
                // Router solicitations come from link-local addresses, which `parse` may refuse.
                let Ok(parsed) = parse(&packet) else { continue };
                assert_eq!(parsed.len as usize, len);
                seen.len_max = seen.len_max.max(len);
                seen.partial += usize::from(offload.checksum == Checksum::Partial);
                seen.tcp_superframes += usize::from(matches!(offload.gso, Gso::Tcp { .. }));
                seen.udp_superframes += usize::from(matches!(offload.gso, Gso::Udp { .. }));
                // As a merged frame would be written: the headers, then the payload in pieces.
                let (head, payload) = buffer[VNET_HEADER_LEN..][..len].split_at(usize::from(parsed.transport));
                let (first, second) = payload.split_at(payload.len() / 2);
                to.write(&VnetHeader::of(offload, &parsed), &[head, first, second].map(IoSlice::new)).unwrap();
            }
        }
    }
}

/// Runs `f` while frames are carried; what the relay saw, and what `f` returned.
fn with_relay<T>(one: &Side, other: &Side, f: impl FnOnce() -> T) -> (Seen, T) {
    let (stop, stopped) = std::io::pipe().unwrap();
    thread::scope(|scope| {
        let carrier = scope.spawn(|| relay(&one.tun.queues[0], &other.tun.queues[0], stop));
        let result = f();
        drop(stopped);
        (carrier.join().unwrap(), result)
    })
}

/// Sends `len` bytes over TCP from one side to the other and compares them.
fn stream(one: &Side, other: &Side, to: IpAddr, len: usize) {
    let listener = other.netns.run(|| TcpListener::bind((to, 0)).unwrap()).unwrap();
    let address = listener.local_addr().unwrap();
    let data: Vec<u8> = (0..len).map(|at| (at * 7 + at / 251) as u8).collect();
    let received = thread::scope(|scope| {
        let receiver = scope.spawn(|| {
            let mut received = Vec::with_capacity(len);
            listener.accept().unwrap().0.read_to_end(&mut received).unwrap();
            received
        });
        let mut client = one.netns.run(|| TcpStream::connect(address).unwrap()).unwrap();
        client.write_all(&data).unwrap();
        drop(client);
        receiver.join().unwrap()
    });
    assert!(received == data, "{} of {len} bytes, or other ones", received.len());
}

#[test]
fn tcp_crosses_in_superframes_and_arrives_byte_for_byte() {
    let Some((one, other)) = two_sides() else { return };
    for to in [other.v4, other.v6] {
        let (seen, ()) = with_relay(&one, &other, || stream(&one, &other, to, 8 << 20));
        assert!(seen.tcp_superframes > 0 && seen.len_max > 10_000 && seen.partial > 0, "{to}: {seen:?}");
    }
}

#[test]
fn with_offloads_switched_off_tcp_crosses_in_whole_small_packets() {
    let Some((one, other)) = two_sides() else { return };
    for side in [&one, &other] {
        side.tun.queues[0].disable(Feature::Checksum).unwrap();
    }
    for to in [other.v4, other.v6] {
        let (seen, ()) = with_relay(&one, &other, || stream(&one, &other, to, 1 << 20));
        assert!(seen.tcp_superframes == 0 && seen.len_max <= 1500 && seen.partial == 0, "{to}: {seen:?}");
    }
}

#[test]
fn udp_superframes_cross_whole_where_the_kernel_has_uso() {
    let Some((one, other)) = two_sides() else { return };
    for to in [other.v4, other.v6] {
        let local = if to.is_ipv4() { one.v4 } else { one.v6 };
        let mut receiver = other.netns.run(|| Receiver::bind(SocketAddr::new(to, 0), 8).unwrap()).unwrap();
        let sender = one.netns.run(|| Sender::open(&[local], 1).unwrap()).unwrap();
        let payload: Vec<u8> = (0..30 * 1200).map(|at| (at % 249) as u8).collect();
        let (seen, received) = with_relay(&one, &other, || {
            sender.send(0, receiver.local(), 0, Some(1200), &[IoSlice::new(&payload)]).unwrap();
            let (mut bytes, mut arena, mut batch) = (Vec::new(), vec![0; 8 * RECEIVE_LEN_MAX], Vec::with_capacity(8));
            while bytes.len() < payload.len() {
                assert!(poll(&mut [PollFd::new(receiver.as_fd(), PollFlags::POLLIN)], PollTimeout::from(5000u16)).unwrap() > 0);
                batch.clear();
                receiver.recv(arena.chunks_exact_mut(RECEIVE_LEN_MAX), &mut batch).unwrap();
                for message in &batch {
                    assert_eq!((message.segment, message.from.ip()), (1200, local));
                    bytes.extend_from_slice(&arena[message.buffer * RECEIVE_LEN_MAX..][..message.len]);
                }
            }
            bytes
        });
        assert!(received == payload);
        assert_eq!(seen.udp_superframes > 0, one.tun.features().uso, "{to}: {seen:?}");
    }
}

#[test]
fn a_plain_header_stands_for_a_whole_packet() {
    assert_eq!(VnetHeader::parse(&VnetHeader::PLAIN, &mut [0x45; 20]), Ok(Offload::default()));
}
