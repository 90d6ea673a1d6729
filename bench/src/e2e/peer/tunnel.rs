//! Tunnels of other makers in user space, between two nodes: wireguard-go and nebula. The ends are the nodes themselves, on the tunnels' own
//! devices: no pod, no veth and no forwarding, which is less than Podgate has to do. Both encrypt.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::{Ipv4Addr, Shutdown};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use podgate::lab::{Lab, Sandbox};
use podgate::netlink::{AddressSpec, LinkSettings};
use podgate_runtime::netns::Netns;
use podgate_testbed::tool::Running;

use super::{Alive, FROM, Peer, TO, network};

/// The largest inner packet whose outer one fits 1,500 bytes: IPv4, UDP, 16 bytes of header and 16 of authentication (nebula and WireGuard
/// alike), and for WireGuard padding to a multiple of 16.
const MTU: u32 = 1_440;

const PATIENCE: Duration = Duration::from_secs(10);

/// A program that runs until this value is dropped.
#[derive(Debug)]
pub struct Program(Child);

impl Drop for Program {
    fn drop(&mut self) {
        // The sandbox ends it at the latest.
        let _ = self.0.kill().and_then(|()| self.0.wait());
    }
}

impl Program {
    fn start(netns: &Netns, mut command: Command, log: &Path) -> anyhow::Result<Program> {
        let file = File::create(log).with_context(|| format!("cannot write {}", log.display()))?;
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let child = netns.run(|| command.spawn())?.with_context(|| format!("cannot start {:?}", command.get_program()))?;
        Ok(Program(child))
    }

    /// Waits until `there`, or until the program gave up.
    fn wait_until(&mut self, log: &Path, there: impl Fn() -> bool) -> anyhow::Result<()> {
        let start = Instant::now();
        while !there() {
            let ended = self.0.try_wait()?;
            if ended.is_some() || start.elapsed() > PATIENCE {
                bail!("it did not come up ({ended:?}): {}", fs::read_to_string(log).unwrap_or_default());
            }
            thread::sleep(Duration::from_millis(10));
        }
        Ok(())
    }
}

/// Private and public keys of the two ends. What they protect is benchmark traffic between namespaces of one machine.
const KEYS: [[&str; 2]; 2] = [
    ["b8baaa79c95cdf6cc3e4967ef408d1b31f28195e42abc75fb6ed7c445f3db84d", "13f68ef21a9acea143fafb87b02013ed7243c107cf467270a2c0175104947135"],
    ["e0e225b14534ed425169cdaed0fdc03a6ee15ba21119c59321b304bfb3be2363", "e59c8538df401a882b1c4b22303a10fde4c275721c0ded9e753278b0ee3f3a2c"],
];

/// wireguard-go on both nodes, told what to do by its own socket (<https://www.wireguard.com/xplatform/>).
pub fn wireguard(sandbox: &Sandbox, binary: &Path) -> anyhow::Result<Peer> {
    const PORT: u16 = 51_820;
    const SOCKETS: &str = "/run/wireguard";
    let lab = Lab::builder(sandbox, binary).named("wireguard").machines()?;
    let mut programs = Vec::new();
    for (own, peer, address, theirs) in [(0, 1, FROM, TO), (1, 0, TO, FROM)] {
        let node = lab.node(own + 1).machine();
        let (name, log) = (format!("wireguard{own}"), lab.directory().join(format!("wireguard{own}.log")));
        let mut command = Command::new("wireguard-go");
        // Without it the program only says that the kernel could do it.
        command.args(["--foreground", &name]).env("WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD", "1").env("LOG_LEVEL", "error");
        let mut program = Program::start(node.netns(), command, &log)?;
        let socket = Path::new(SOCKETS).join(format!("{name}.sock"));
        program.wait_until(&log, || UnixStream::connect(&socket).is_ok())?;
        let configuration = format!(
            "set=1\nprivate_key={}\nlisten_port={PORT}\nreplace_peers=true\npublic_key={}\nendpoint={}:{PORT}\nreplace_allowed_ips=true\nallowed_ip={theirs}/32\n\n",
            KEYS[own][0],
            KEYS[peer][1],
            lab.node(peer + 1).machine().addresses().v4,
        );
        let mut stream = UnixStream::connect(&socket).with_context(|| format!("cannot reach {}", socket.display()))?;
        stream.write_all(configuration.as_bytes())?;
        stream.shutdown(Shutdown::Write)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        ensure!(answer.contains("errno=0"), "wireguard-go refuses its configuration: {answer}");
        let netlink = node.netlink()?;
        netlink.set_link(&name, &LinkSettings::new().mtu(MTU).up())?;
        netlink.add_address(&AddressSpec::new(&name, network(address, 24)))?;
        programs.push(program);
    }
    peer(lab, programs)
}

/// nebula on both nodes, with an authority and two certificates made for the occasion.
pub fn nebula(sandbox: &Sandbox, binary: &Path) -> anyhow::Result<Peer> {
    const PORT: u16 = 4_242;
    let lab = Lab::builder(sandbox, binary).named("nebula").machines()?;
    let directory = lab.directory().to_owned();
    let path = |name: &str| directory.join(name).display().to_string();
    let certify = |arguments: &[&str]| -> anyhow::Result<()> {
        let mut command = Command::new("nebula-cert");
        command.args(arguments);
        Running::start(command, b"")?.end(PATIENCE)?.success()?;
        Ok(())
    };
    let (ca, ca_key) = (path("ca.crt"), path("ca.key"));
    certify(&["ca", "-name", "bench", "-out-crt", &ca, "-out-key", &ca_key])?;
    let mut programs = Vec::new();
    for (own, other, address, theirs) in [(1, 2, FROM, TO), (2, 1, TO, FROM)] {
        let (certificate, key) = (path(&format!("{own}.crt")), path(&format!("{own}.key")));
        let (name, ip) = (format!("node-{own}"), format!("{address}/24"));
        certify(&["sign", "-ca-crt", &ca, "-ca-key", &ca_key, "-name", &name, "-ip", &ip, "-out-crt", &certificate, "-out-key", &key])?;
        let configuration = format!(
            "pki: {{ca: {ca}, cert: {certificate}, key: {key}}}\nstatic_host_map: {{\"{theirs}\": [\"{}:{PORT}\"]}}\n\
             lighthouse: {{am_lighthouse: false, interval: 60}}\nlisten: {{host: 0.0.0.0, port: {PORT}, batch: 64, read_buffer: 10485760, write_buffer: 10485760}}\n\
             tun: {{dev: nebula{own}, mtu: {MTU}, tx_queue: 500}}\nlogging: {{level: warning}}\n\
             firewall: {{outbound: [{{port: any, proto: any, host: any}}], inbound: [{{port: any, proto: any, host: any}}]}}\n",
            lab.node(other).machine().addresses().v4,
        );
        let (file, log) = (directory.join(format!("nebula{own}.yaml")), directory.join(format!("nebula{own}.log")));
        fs::write(&file, configuration).with_context(|| format!("cannot write {}", file.display()))?;
        let mut command = Command::new("nebula");
        command.arg("-config").arg(&file);
        let node = lab.node(own).machine();
        let mut program = Program::start(node.netns(), command, &log)?;
        let netlink = node.netlink()?;
        let device = format!("nebula{own}");
        program.wait_until(&log, || netlink.expect_link(&device).is_ok_and(|link| link.mtu == MTU))?;
        programs.push(program);
    }
    peer(lab, programs)
}

/// The nodes as ends, once a connection has gone through: the first packets make the handshake, and some are lost over it.
fn peer(lab: Lab, programs: Vec<Program>) -> anyhow::Result<Peer> {
    let [from, to] = [lab.node(1).machine().netns().try_clone()?, lab.node(2).machine().netns().try_clone()?];
    wait_for_connection(&from, &to, TO)?;
    let alive = Alive { _programs: programs, _nodes: Some(lab), ..Alive::default() };
    Ok(Peer { from: Some(from), to: vec![(to, TO.into())], _alive: alive, ..Peer::default() })
}

fn wait_for_connection(from: &Netns, to: &Netns, address: Ipv4Addr) -> anyhow::Result<()> {
    let start = Instant::now();
    loop {
        let tried = to.run(|| std::net::TcpListener::bind((address, 0)))?.and_then(|listener| {
            let target = listener.local_addr()?;
            from.run(|| std::net::TcpStream::connect_timeout(&target, Duration::from_secs(2)))?
        });
        match tried {
            Ok(_) => return Ok(()),
            Err(error) if start.elapsed() > PATIENCE => return Err(error).context("nothing passes the tunnel"),
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
    }
}
