//! Serves an empty cluster: `cargo run -p podgate-apiserver -- 127.0.0.1:8001`, then `kubectl --server http://127.0.0.1:8001 get svc -A`.

use std::process::ExitCode;

use podgate_apiserver::ApiServer;

fn main() -> ExitCode {
    let Some(address) = std::env::args().nth(1) else {
        eprintln!("usage: podgate-apiserver ADDRESS:PORT");
        return ExitCode::from(2);
    };
    let served = tokio::runtime::Builder::new_current_thread().enable_all().build().and_then(|runtime| {
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::bind(&address).await?;
            eprintln!("serving on http://{}", listener.local_addr()?);
            ApiServer::default().serve(listener).await
        })
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("podgate-apiserver: {address}: {error}");
            ExitCode::FAILURE
        }
    }
}
