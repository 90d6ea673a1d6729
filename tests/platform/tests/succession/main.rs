//! One gateway after the other on a node, with traffic: killed under its supervisor, started anew, relieved by another that was started beside
//! it; and what becomes of the node when that other one fails.

mod traffic;

use std::io;
use std::os::fd::OwnedFd;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use podgate::daemon::HANDOVER_SOCKET;
use podgate::keeper::wire;
use podgate::lab::matrix::Probe;
use podgate::lab::{Lab, LabError, Node, NodeSettings, wait_until};
use podgate::netlink::Family;
use podgate_testbed::{Bed, Outcome, all_hold, run};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

use traffic::{Summary, Traffic};

type Try<T> = Result<T, Box<dyn std::error::Error>>;

const PATIENCE: Duration = Duration::from_secs(20);

/// What a worker has in its hands when it is killed is lost: a batch or two of a datagram in a millisecond.
const IN_HAND: usize = 8;

/// A SYN is sent again after a second; an answer that took less was not waited for in vain.
const SYN_AGAIN: Duration = Duration::from_millis(950);

fn main() -> ExitCode {
    run(|tests| {
        tests.configure(settings());
        tests.add("a gateway that is killed under its supervisor loses nothing of what arrives until the next one reads it", killed);
        tests.add("a gateway that is told to start anew by SIGHUP has another number of workers and loses no connection", renewed);
        tests.add("a gateway that is relieved hands the node over without losing a packet", relieved);
        tests.add("a node is handed over to gateways with fewer and with more workers", relieved_by_other_numbers);
        tests.add("a successor that ends while it takes over leaves the node to the gateway that had it", fails);
        tests.add("a successor that says nothing after it was given the node does not keep it", silent);
        tests.add("a gateway that was relieved takes the node back when its successor ends", outlived);
        tests.add("a supervisor whose gateway cannot start ends as it did", cannot_start);
        tests.add("every path still works", |bed| still_works(bed.lab()?));
    })
}

fn settings() -> NodeSettings {
    NodeSettings { run: ["--supervise", "--take-over"].map(String::from).into(), ..NodeSettings::default() }
}

fn still_works(lab: &Lab) -> Outcome {
    all_hold(&lab.check_paths(&lab.paths()?, &[Probe::Tcp, Probe::Udp], &|_, _| {})?)
}

/// The gateway that a supervisor has started, if there is one.
fn gateway_of(supervisor: u32) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{supervisor}/task/{supervisor}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}

/// Waits until the node's log says `words` once more than `before` times.
fn said_again(node: &Node, words: &str, before: usize) -> Result<(), LabError> {
    let times = || node.log().matches(words).count();
    wait_until(PATIENCE, || format!("{}: {words:?} in the log", node.name()), || Ok((times() <= before).then(|| node.log_tail(20))))
}

fn times(node: &Node, words: &str) -> usize {
    node.log().matches(words).count()
}

const READY: &str = "readiness ready=true";
const HANDED_OVER: &str = "handed the node over to a successor";

/// Waits until the traffic has gone on for a while after what was done to it.
fn settle(traffic: &Traffic) -> Result<(), LabError> {
    let before = traffic.echoed();
    wait_until(PATIENCE, || "traffic afterwards".into(), || Ok((traffic.echoed() < before + 500).then(|| format!("{}", traffic.echoed() - before))))
}

fn report(what: &str, pause: Duration, summary: &Summary) {
    eprintln!("    {what} after {} ms", pause.as_millis());
    eprintln!("      {summary}");
}

fn killed(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let node = lab.node(1);
    for again in 1..=3 {
        let traffic = Traffic::start(lab)?;
        let supervisor = node.pid().ok_or("no daemon")?;
        let gateway = gateway_of(supervisor).ok_or("no gateway")?;
        let ready = times(node, READY);
        let start = Instant::now();
        kill(Pid::from_raw(gateway as i32), Signal::SIGKILL)?;
        said_again(node, READY, ready)?;
        let pause = start.elapsed();
        settle(&traffic)?;
        let summary = traffic.finish()?;
        report(&format!("killed for the {again}. time; ready"), pause, &summary);
        assert_eq!(node.pid(), Some(supervisor), "the supervisor stays");
        assert_ne!(gateway_of(supervisor), Some(gateway));
        assert!(summary.lost <= IN_HAND, "{} datagrams were lost\n{}", summary.lost, node.log_tail(30));
        assert!(summary.broken.is_empty(), "{:?}", summary.broken);
        assert!(summary.slowest_connection < SYN_AGAIN, "{:?}", summary.slowest_connection);
    }
    Ok(())
}

/// The numbers of workers that a node has one after the other, from two on.
const NUMBERS: [u16; 3] = [1, 3, 2];

/// What waits in a queue that is given up is lost, and the kernel leads some packets to it for seconds (drivers/net/tun.c, `__tun_detach`).
fn tolerance(workers: u16) -> Duration {
    if workers < 3 { 4 * SYN_AGAIN } else { SYN_AGAIN }
}

/// Writes the node's configuration with so many workers.
fn with_workers(node: &Node, workers: u16) -> Try<NodeSettings> {
    let settings = NodeSettings { workers: Some(workers), ..settings() };
    node.configure(&settings, &Lab::ranges())?;
    Ok(settings)
}

fn workers(node: &Node) -> Try<u64> {
    Ok(node.query(&["status"])?["workers"].as_u64().ok_or("no number")?)
}

fn renewed(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let node = lab.node(1);
    for count in NUMBERS {
        let traffic = Traffic::start(lab)?;
        with_workers(node, count)?;
        let ready = times(node, READY);
        let start = Instant::now();
        kill(Pid::from_raw(node.pid().ok_or("no daemon")? as i32), Signal::SIGHUP)?;
        said_again(node, READY, ready)?;
        let pause = start.elapsed();
        settle(&traffic)?;
        let summary = traffic.finish()?;
        report(&format!("{count} workers; ready"), pause, &summary);
        assert_eq!(workers(node)?, u64::from(count));
        assert!(summary.broken.is_empty(), "{:?}", summary.broken);
        assert!(summary.slowest_connection < tolerance(count), "{:?}", summary.slowest_connection);
    }
    Ok(())
}

/// Starts a gateway beside the node's, waits until it has the node, and ends the other; how long that took, and the traffic's fate.
fn relieve(lab: &Lab, node: &Node, settings: &NodeSettings) -> Try<(Duration, Summary)> {
    let traffic = Traffic::start(lab)?;
    let old = Pid::from_raw(node.pid().ok_or("no daemon")? as i32);
    let (handed_over, ready) = (times(node, HANDED_OVER), times(node, READY));
    let start = Instant::now();
    node.launch(settings)?;
    said_again(node, HANDED_OVER, handed_over)?;
    said_again(node, READY, ready)?;
    let took = start.elapsed();
    kill(old, Signal::SIGTERM)?;
    assert_eq!(waitpid(old, None)?, WaitStatus::Exited(old, 0));
    settle(&traffic)?;
    Ok((took, traffic.finish()?))
}

fn relieved(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let node = lab.node(1);
    for again in 1..=3 {
        let (took, summary) = relieve(lab, node, &settings())?;
        report(&format!("relieved for the {again}. time; ready"), took, &summary);
        let paused = node.log();
        let paused = paused.lines().rev().find(|line| line.contains("took over from the gateway")).unwrap_or_default();
        eprintln!("      its workers stood still for {} us", paused.split("pause_us=").nth(1).unwrap_or_default());
        assert_eq!(summary.lost, 0, "{}", node.log_tail(30));
        assert!(summary.broken.is_empty(), "{:?}", summary.broken);
        assert!(summary.slowest_connection < SYN_AGAIN, "{:?}", summary.slowest_connection);
    }
    Ok(())
}

fn relieved_by_other_numbers(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let node = lab.node(1);
    for count in NUMBERS {
        let settings = with_workers(node, count)?;
        let (took, summary) = relieve(lab, node, &settings)?;
        report(&format!("{count} workers; ready"), took, &summary);
        assert_eq!(workers(node)?, u64::from(count));
        assert!(summary.broken.is_empty(), "{:?}", summary.broken);
        assert!(summary.slowest_connection < tolerance(count), "{:?}", summary.slowest_connection);
    }
    Ok(())
}

/// A peer of the running gateway's that speaks its protocol badly.
struct Asker(OwnedFd);

impl Asker {
    /// Asks for the node and takes what is given, to the last descriptor.
    fn given(node: &Node) -> Try<(Asker, Vec<OwnedFd>)> {
        let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None)?;
        rustix::net::connect(&socket, &SocketAddrUnix::new(node.socket().with_file_name(HANDOVER_SOCKET))?)?;
        wire::send(&socket, br#"{"ask": {"workers": 2}}"#, &[])?;
        let mut all = Vec::new();
        loop {
            let message = wire::receive(&socket)?;
            let said: serde_json::Value = serde_json::from_slice(&message.bytes)?;
            assert_eq!(said["given"]["names"].as_array().map(Vec::len), Some(message.fds.len()), "{said}");
            all.extend(message.fds);
            if said["given"]["more"] == false {
                return Ok((Asker(socket), all));
            }
        }
    }
}

fn fails(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let node = lab.node(1);
    let traffic = Traffic::start(lab)?;
    let went_on = times(node, "forwarding again");
    let start = Instant::now();
    let (asker, given) = Asker::given(node)?;
    assert!(given.len() > 60, "two queues of each TUN, the overlay's sockets, the lock, the namespace: {}", given.len());
    drop((asker, given));
    said_again(node, "forwarding again", went_on)?;
    let took = start.elapsed();
    settle(&traffic)?;
    let summary = traffic.finish()?;
    report("given to one that gave up; went on", took, &summary);
    assert_eq!(summary.lost, 0, "{}", node.log_tail(30));
    assert!(summary.broken.is_empty(), "{:?}", summary.broken);

    // A whole gateway, whose overlay port somebody has: it learns that when it has the node already.
    let traffic = Traffic::start(lab)?;
    let busy = std::net::SocketAddr::new(node.machine().address(Family::V4), 4791);
    let _holder = node.machine().run(|| std::net::UdpSocket::bind(busy))??;
    let config = node.config().with_file_name("busy.yaml");
    std::fs::write(&config, std::fs::read_to_string(node.config())? + "overlay: {port: 4791}\n")?;
    let mut command = std::process::Command::new(bed.binary());
    command.args(["run", "--supervise", "--take-over", "--config"]).arg(&config).stdin(std::process::Stdio::null());
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::piped());
    let start = Instant::now();
    let output = node.machine().run(|| command.output())??;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("192.0.2.1:4791 (UDP) is in use"), "{said}");
    said_again(node, "forwarding again", went_on + 1)?;
    settle(&traffic)?;
    let summary = traffic.finish()?;
    report("given to one without its port; went on", start.elapsed(), &summary);
    assert_eq!(summary.lost, 0, "{}", node.log_tail(30));
    assert!(summary.broken.is_empty(), "{:?}", summary.broken);
    assert!(summary.slowest_connection < SYN_AGAIN, "{:?}", summary.slowest_connection);
    // What the failed one was given has not gone to its supervisor: the node's own gateway can be killed as ever.
    killed(bed)
}

fn silent(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let node = lab.node(1);
    let went_on = times(node, "forwarding again");
    let start = Instant::now();
    let (asker, given) = Asker::given(node)?;
    // Its end is heard when the gateway has lost patience.
    let message = wire::receive(&asker.0)?;
    assert!(message.bytes.is_empty() && start.elapsed() >= Duration::from_secs(5), "{message:?} after {:?}", start.elapsed());
    said_again(node, "forwarding again", went_on)?;
    drop(given);
    Ok(node.wait_ready()?)
}

fn outlived(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let node = lab.node(1);
    let traffic = Traffic::start(lab)?;
    let (handed_over, ready) = (times(node, HANDED_OVER), times(node, READY));
    let mut command = std::process::Command::new(bed.binary());
    command.args(["run", "--take-over", "--config"]).arg(node.config()).env("PODGATE_LOG", "info").stdin(std::process::Stdio::null());
    command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
    let mut successor = node.machine().run(|| command.spawn())??;
    said_again(node, HANDED_OVER, handed_over)?;
    node.podgate(&["status", "--wait=20"])?;
    let start = Instant::now();
    successor.kill()?;
    successor.wait()?;
    said_again(node, READY, ready)?;
    let took = start.elapsed();
    settle(&traffic)?;
    let summary = traffic.finish()?;
    report("its successor was killed; ready", took, &summary);
    assert!(summary.broken.is_empty(), "{:?}", summary.broken);
    Ok(())
}

fn cannot_start(bed: &Bed) -> Outcome {
    let lab = bed.lab()?;
    let node = lab.node(2);
    // Somebody has the node, and this one does not take over: it is told what is in the way, once.
    let mut command = std::process::Command::new(bed.binary());
    command.args(["run", "--supervise", "--config"]).arg(node.config()).stdin(std::process::Stdio::null());
    let output = node.machine().run(|| command.output())??;
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!((output.status.code(), said.matches("a running podgate holds").count()), (Some(1), 1), "{said}");
    let sockets = |directory: &std::path::Path| -> io::Result<usize> {
        Ok(std::fs::read_dir(directory)?.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with("supervisor-")).count())
    };
    assert_eq!(sockets(node.socket().parent().ok_or("no directory")?)?, 1, "that of the supervisor that runs");
    Ok(())
}
