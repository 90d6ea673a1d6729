//! A peer on a Unix socket: answers one connection after the other as its script says, and records what it is asked.

use std::collections::VecDeque;
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use podgate_cni::{Request, Response};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::{Value, json};

/// What becomes of one connection.
pub enum Step {
    /// Answered with this.
    Ok(Value),
    /// Refused.
    Error(u32, &'static str),
    /// Closed after the request was read.
    HangUp,
    /// Closed after the request was read, again and again, until there is a note; then it is answered.
    HangUpUntilNoted,
    /// Closed before.
    Close,
    /// These bytes, whatever they are.
    Bytes(&'static str),
    /// Never answered.
    Silence,
    /// Half of an answer, and nothing after it.
    Stall,
}

/// A request, and the inode of each namespace that came with it.
#[derive(Debug)]
pub struct Asked {
    pub request: Request,
    pub namespaces: Vec<u64>,
}

pub struct Peer {
    pub socket: PathBuf,
    directory: tempfile::TempDir,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Vec<Asked>>>,
}

impl Peer {
    /// Listens, and does as `script` says; who asks more than it holds is told so.
    pub fn with(script: impl IntoIterator<Item = Step>) -> Peer {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("podgate.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let (script, stopped) = (script.into_iter().collect(), stop.clone());
        let thread = std::thread::spawn(move || serve(&listener, script, &stopped));
        Peer { socket, directory, stop, thread: Some(thread) }
    }

    /// Nobody listens.
    pub fn down() -> Peer {
        let directory = tempfile::tempdir().unwrap();
        Peer { socket: directory.path().join("podgate.sock"), directory, stop: Arc::default(), thread: None }
    }

    /// Where the plugin leaves notes.
    pub fn notes(&self) -> PathBuf {
        self.directory.path().join("detach.d")
    }

    /// The files of a directory of its own.
    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Ends, and tells what was asked.
    pub fn asked(&mut self) -> Vec<Asked> {
        self.stop.store(true, Ordering::SeqCst);
        let Some(thread) = self.thread.take() else { return Vec::new() };
        drop(UnixStream::connect(&self.socket));
        thread.join().unwrap()
    }

    /// Ends, and tells the requests alone.
    pub fn requests(&mut self) -> Vec<Request> {
        self.asked().into_iter().map(|asked| asked.request).collect()
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        self.asked();
    }
}

fn serve(listener: &UnixListener, mut script: VecDeque<Step>, stop: &AtomicBool) -> Vec<Asked> {
    let notes = listener.local_addr().unwrap().as_pathname().unwrap().with_file_name("detach.d");
    let (mut asked, mut held) = (Vec::new(), Vec::new());
    loop {
        let (mut stream, _) = listener.accept().unwrap();
        if stop.load(Ordering::SeqCst) {
            return asked;
        }
        let step = script.pop_front().unwrap_or(Step::Error(999, "nothing more is in the script"));
        if let Step::Close = step {
            continue;
        }
        asked.push(receive(&stream));
        let answer = match step {
            Step::Ok(value) => serde_json::to_string(&Response::Ok(value)).unwrap() + "\n",
            Step::Error(code, message) => serde_json::to_string(&Response::Error { code, message: message.into() }).unwrap() + "\n",
            Step::Bytes(bytes) => bytes.into(),
            Step::HangUp | Step::Close => String::new(),
            Step::HangUpUntilNoted if !notes.exists() => {
                script.push_front(Step::HangUpUntilNoted);
                continue;
            }
            Step::HangUpUntilNoted => "{\"ok\":{\"detached\":true}}\n".into(),
            Step::Silence | Step::Stall => {
                let half = if let Step::Stall = step { "{\"ok\":" } else { "" };
                stream.write_all(half.as_bytes()).unwrap();
                held.push(stream);
                continue;
            }
        };
        // A plugin that was killed does not read it.
        let _ = stream.write_all(answer.as_bytes());
    }
}

fn receive(stream: &UnixStream) -> Asked {
    let (mut line, mut namespaces) = (Vec::new(), Vec::new());
    while !line.ends_with(b"\n") {
        let mut chunk = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut slices = [IoSliceMut::new(&mut chunk)];
        let received = rustix::net::recvmsg(stream, &mut slices, &mut ancillary, RecvFlags::CMSG_CLOEXEC).unwrap().bytes;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                namespaces.extend(fds.map(|fd| rustix::fs::fstat(&fd).unwrap().st_ino));
            }
        }
        assert_ne!(received, 0, "the request ends before its line does: {}", String::from_utf8_lossy(&line));
        line.extend_from_slice(&chunk[..received]);
    }
    Asked { request: serde_json::from_slice(&line).unwrap(), namespaces }
}

/// What the daemon answers to an attachment.
pub fn attached() -> Step {
    Step::Ok(json!({
        "interfaces": [{"name": "veth1", "mac": "02:00:00:00:00:01", "mtu": 1450}, {"name": "eth0", "mac": "02:00:00:00:00:02", "mtu": 1450, "sandbox": "/proc/self/ns/net"}],
        "ips": [{"address": "10.244.1.5/32", "gateway": "10.244.1.1", "interface": 1}, {"address": "fd00::5/128", "interface": 1}],
        "routes": [{"dst": "0.0.0.0/0", "gw": "10.244.1.1", "mtu": 1400, "scope": 0}],
    }))
}
