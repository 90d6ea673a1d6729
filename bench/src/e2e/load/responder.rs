//! What answers transactions: one thread for all receivers of a measurement, whichever namespaces they are in.

use std::collections::HashMap;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::thread::{self, JoinHandle};

use anyhow::Context;
use mio::event::Source;
use mio::net::{TcpListener, TcpStream};
use mio::{Events, Interest, Poll, Token, Waker};

use super::{ANSWER_PORT, Server, speak_cubic};

/// Asks for one byte, and keeps the connection.
pub const AGAIN: u8 = b'r';
/// Asks for one byte and the connection's end.
pub const LAST: u8 = b'c';

/// The thread, which ends with this value.
#[derive(Debug)]
pub struct Responder {
    waker: Waker,
    thread: Option<JoinHandle<io::Result<()>>>,
}

const OVER: Token = Token(usize::MAX);

impl Responder {
    /// Answers on every server's [`ANSWER_PORT`] from now on.
    pub fn start(servers: &[Server<'_>]) -> anyhow::Result<Responder> {
        let poll = Poll::new().context("cannot make an epoll")?;
        let waker = Waker::new(poll.registry(), OVER).context("cannot make a waker")?;
        let mut listeners = Vec::new();
        for (number, server) in servers.iter().enumerate() {
            let address = SocketAddr::new(server.address, ANSWER_PORT);
            let bound = server.netns.run(|| TcpListener::bind(address))?;
            let mut listener = bound.with_context(|| format!("cannot listen on {address}"))?;
            speak_cubic(&listener)?;
            poll.registry().register(&mut listener, Token(number), Interest::READABLE)?;
            listeners.push(listener);
        }
        let thread = thread::Builder::new().name("responder".into()).spawn(move || answer(poll, &listeners))?;
        Ok(Responder { waker, thread: Some(thread) })
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        let woken = self.waker.wake();
        if let (Ok(()), Some(Ok(Err(error)))) = (woken, self.thread.take().map(JoinHandle::join)) {
            eprintln!("podgate-bench: the responder ended early: {error}");
        }
    }
}

fn answer(mut poll: Poll, listeners: &[TcpListener]) -> io::Result<()> {
    let mut events = Events::with_capacity(1024);
    let mut connections: HashMap<Token, TcpStream> = HashMap::new();
    let mut next = listeners.len();
    loop {
        match poll.poll(&mut events, None) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            result => result?,
        }
        for event in &events {
            let token = event.token();
            if token == OVER {
                return Ok(());
            }
            if let Some(listener) = listeners.get(token.0) {
                while let Some(mut connection) = accept(listener)? {
                    connection.register(poll.registry(), Token(next), Interest::READABLE)?;
                    connections.insert(Token(next), connection);
                    next += 1;
                }
            } else if let Some(connection) = connections.get_mut(&token)
                && !serve(connection)
            {
                // Closed by its drop: with everything read, that is an orderly end.
                connections.remove(&token);
            }
        }
    }
}

fn accept(listener: &TcpListener) -> io::Result<Option<TcpStream>> {
    loop {
        match listener.accept() {
            Ok((connection, _)) => return Ok(Some(connection)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
            // It ended before it was taken (accept(2)).
            Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(error),
        }
    }
}

/// Answers what was asked; whether the connection goes on.
fn serve(connection: &mut TcpStream) -> bool {
    let mut asked = [0; 64];
    loop {
        match connection.read(&mut asked) {
            Ok(0) => return false,
            Ok(len) => {
                if connection.write_all(&asked[..len]).is_err() || asked[..len].contains(&LAST) {
                    return false;
                }
                if len < asked.len() {
                    return true;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return true,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
}
