//! Datagrams that a pod sends one by one are written as superframes, and the programs at both ends do not notice.
//!
//! Skipped, with the reason printed, where namespaces or TUN devices are not permitted, or there is no `ip` (iproute2).

mod nodes;

use std::io::IoSliceMut;
use std::net::UdpSocket;
use std::os::fd::AsRawFd;

use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt};
use nodes::*;
use podgate_core::verdict::TunId;
use podgate_runtime::runtime::{PodTun, Runtime};
use podgate_runtime::tun::Feature;

/// Whether a sender's socket is connected: then the kernel counts IPv4 identifications up, else they are all 0.
#[derive(Clone, Copy, PartialEq)]
enum Sender {
    Connected,
    Unconnected,
}

/// What a pod sends to the other: lengths that make superframes with and without a shorter last datagram, and some that make none.
fn datagrams() -> Vec<Vec<u8>> {
    let lens = [vec![1000; 20], vec![300], vec![36; 15], vec![100, 200, 300, 400], vec![1372; 19]].concat();
    lens.into_iter().enumerate().map(|(index, len)| pattern(index + len)[index..].to_vec()).collect()
}

/// As how many frames they are written if nothing cuts them short.
const FRAMES: u64 = 7;

/// Two pods with TUNs of their own, which one worker reads.
fn node() -> Option<(Node, Node)> {
    let (mut one, two) = two_nodes()?;
    (one.attach, one.workers) = ([Attach::Tun; 2], 1);
    Some((one, two))
}

/// Sends all [`datagrams`] over IPv4 and IPv6 while nobody reads the pods' TUNs. Gives back the TUNs, and the sockets that are to receive.
fn send(one: &Node, sender: Sender) -> (Vec<(TunId, PodTun)>, [UdpSocket; 2]) {
    let tuns = one.pod_tuns();
    let servers = [true, false].map(|v4| {
        let server = one.pods[1].run(|| UdpSocket::bind((one.pod(1, v4), 0)).unwrap()).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let client = one.pods[0].run(|| UdpSocket::bind((one.pod(0, v4), 0)).unwrap()).unwrap();
        let to = server.local_addr().unwrap();
        if sender == Sender::Connected {
            client.connect(to).unwrap();
        }
        for datagram in datagrams() {
            let sent = if sender == Sender::Connected { client.send(&datagram) } else { client.send_to(&datagram, to) };
            assert_eq!(sent.unwrap(), datagram.len());
        }
        server
    });
    (tuns, servers)
}

fn arrive_one_by_one(servers: &[UdpSocket]) {
    let mut buffer = vec![0; 65_536];
    for server in servers {
        for expected in datagrams() {
            let (len, _) = receive(server, &mut buffer);
            assert!(buffer[..len] == expected, "{len} bytes for {}", expected.len());
        }
    }
}

/// Frames and packets written to pods.
fn written(runtime: &Runtime) -> (u64, u64) {
    (sum(runtime, |c| c.pods_tx.frames.value()), sum(runtime, |c| c.pods_tx.packets.value()))
}

/// Whether there is anything to be seen here.
fn without_uso(runtime: &Runtime) -> bool {
    let without = !runtime.features().uso.on;
    if without {
        eprintln!("skipped: this kernel takes no UDP superframes on a TUN");
    }
    without
}

#[test]
fn datagrams_that_waited_together_are_written_together_and_arrive_one_by_one() {
    for sender in [Sender::Connected, Sender::Unconnected] {
        let Some((one, two)) = node() else { return };
        let (tuns, servers) = send(&one, sender);
        let runtime = one.start_on(Some(&two), tuns, |_, _| {}).unwrap();
        if without_uso(&runtime) {
            return;
        }
        arrive_one_by_one(&servers);
        let packets = 2 * datagrams().len() as u64;
        wait("each is counted", || written(&runtime).1 == packets);
        // A full batch cuts one in two.
        let frames = written(&runtime).0;
        assert!((2 * FRAMES..=2 * FRAMES + 2).contains(&frames), "{packets} packets in {frames} frames");
        assert!(sum(&runtime, |c| c.pods_rx.frames.value()) >= packets, "each was read alone");
        assert_eq!(runtime.features().uso.refusals, 0);
    }
}

#[test]
fn a_program_that_asks_for_it_receives_what_was_joined_as_it_is() {
    let Some((one, two)) = node() else { return };
    let (tuns, servers) = send(&one, Sender::Connected);
    for server in &servers {
        setsockopt(server, sockopt::UdpGroSegment, &true).unwrap();
    }
    let runtime = one.start_on(Some(&two), tuns, |_, _| {}).unwrap();
    if without_uso(&runtime) {
        return;
    }
    let mut buffer = vec![0; 65_536];
    for server in &servers {
        let (expected, mut received, mut reads) = (datagrams(), Vec::new(), 0);
        while received.len() < expected.len() {
            let mut slices = [IoSliceMut::new(&mut buffer)];
            let mut space = nix::cmsg_space!(i32);
            let message = recvmsg::<SockaddrStorage>(server.as_raw_fd(), &mut slices, Some(&mut space), MsgFlags::empty()).unwrap();
            let joined = message.cmsgs().unwrap().find_map(|message| match message {
                ControlMessageOwned::UdpGroSegments(size) => usize::try_from(size).ok(),
                _ => None,
            });
            let len = message.bytes;
            received.extend(buffer[..len].chunks(joined.unwrap_or(len)).map(<[u8]>::to_vec));
            reads += 1;
        }
        assert!(received == expected);
        assert!((FRAMES..=FRAMES + 2).contains(&reads), "{reads} reads");
    }
}

#[test]
fn without_uso_each_datagram_is_written_alone() {
    let Some((one, two)) = node() else { return };
    let (tuns, servers) = send(&one, Sender::Connected);
    let off = |_: &mut _, host: &mut podgate_runtime::tun::Tun| {
        host.queues[0].disable(Feature::Uso).unwrap();
    };
    let runtime = one.start_on(Some(&two), tuns, off).unwrap();
    assert!(!runtime.features().uso.on);
    arrive_one_by_one(&servers);
    let packets = 2 * datagrams().len() as u64;
    wait("each is counted", || written(&runtime) == (packets, packets));
}

/// From now on the calling thread's and its descendants' `writev` of more than three slices fails with EINVAL, as that of a superframe does on a
/// kernel that promised to take it and does not: a whole frame has two slices, one that was cut in software three.
fn refuse_superframes() {
    let code = |code: u32| code as u16;
    let jump =
        |condition, value, otherwise| libc::sock_filter { code: code(libc::BPF_JMP | condition | libc::BPF_K), jt: 0, jf: otherwise, k: value };
    let load = |offset| libc::sock_filter { code: code(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS), jt: 0, jf: 0, k: offset };
    let end = |value| libc::sock_filter { code: code(libc::BPF_RET | libc::BPF_K), jt: 0, jf: 0, k: value };
    // The low half of the third argument in struct seccomp_data (linux/seccomp.h).
    let count = 16 + 2 * 8 + if cfg!(target_endian = "big") { 4 } else { 0 };
    let mut program = [
        load(0),
        jump(libc::BPF_JEQ, libc::SYS_writev as u32, 3),
        load(count),
        jump(libc::BPF_JGT, 3, 1),
        end(libc::SECCOMP_RET_ERRNO | libc::EINVAL as u32),
        end(libc::SECCOMP_RET_ALLOW),
    ];
    let program = libc::sock_fprog { len: program.len() as u16, filter: program.as_mut_ptr() };
    // SAFETY: the first takes numbers alone; the second reads a program that is alive.
    let set = unsafe {
        let quiet = libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        quiet | libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program)
    };
    assert_eq!(set, 0, "{}", std::io::Error::last_os_error());
}

#[test]
fn what_the_kernel_refuses_to_take_joined_is_cut_again_and_no_more_is_joined() {
    let Some((one, two)) = node() else { return };
    let (tuns, servers) = send(&one, Sender::Connected);
    // The commands that wire the pods have run.
    refuse_superframes();
    let runtime = one.start_on(Some(&two), tuns, |_, _| {}).unwrap();
    arrive_one_by_one(&servers);
    let packets = 2 * datagrams().len() as u64;
    wait("each is counted", || written(&runtime) == (packets, packets));
    let uso = runtime.features().uso;
    assert!(uso.refusals >= 6 && uso.on == (uso.refusals < 8), "{uso:?}");
    assert!(drops(&runtime).iter().all(|(name, _)| !name.starts_with("write")), "{:?}", drops(&runtime));
}

#[test]
fn a_burst_from_a_pod_behind_a_veth_is_joined_too() {
    let Some((one, two)) = two_nodes() else { return };
    let runtime = one.start(Some(&two), |_, _| {}).unwrap();
    if without_uso(&runtime) {
        return;
    }
    for v4 in [true, false] {
        let server = one.pods[1].run(|| UdpSocket::bind((one.pod(1, v4), 0)).unwrap()).unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        let client = one.pods[0].run(|| UdpSocket::bind((one.pod(0, v4), 0)).unwrap()).unwrap();
        client.connect(server.local_addr().unwrap()).unwrap();
        let before = written(&runtime);
        let mut buffer = [0; 2000];
        // A worker that is quick reads each by itself.
        wait("some are joined", || {
            for number in 0..100_u8 {
                client.send(&[number; 100]).unwrap();
            }
            for number in 0..100 {
                let (len, _) = receive(&server, &mut buffer);
                assert_eq!(buffer[..len], [number; 100]);
            }
            let now = written(&runtime);
            now.0 - before.0 < now.1 - before.1
        });
    }
}
