//! A headless Chromium, told what to do over its own DevTools protocol, and what it had to complain about.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use futures::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

/// A browser with one page.
pub struct Browser {
    child: Child,
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    session: String,
    calls: u64,
    /// Everything on the console, as it came.
    pub console: Vec<String>,
    /// The errors among that, and exceptions.
    pub complaints: Vec<String>,
    /// What a redirect led to, from where.
    pub redirects: Vec<(String, String)>,
    /// Its profile, and everything else it writes.
    directory: TempDir,
}

impl Browser {
    /// Starts one, with an empty page.
    pub async fn start() -> Self {
        let directory = TempDir::with_prefix("wrenn-browser-").unwrap();
        let mut child = Command::new("chromium")
            .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"])
            .args(["--disable-background-networking", "--remote-debugging-port=0", "about:blank"])
            .arg(format!("--user-data-dir={}", directory.path().join("profile").display()))
            .env("TMPDIR", directory.path())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("chromium is installed; tools/setup.sh does");
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let address = lines.find_map(|line| Some(line.strip_prefix("DevTools listening on ")?.to_owned()));
        let address = address.expect("chromium says where it listens");
        // What it prints later must go somewhere, or it stops.
        std::thread::spawn(move || lines.for_each(drop));
        let (socket, _) = tokio_tungstenite::connect_async(address).await.unwrap();
        let (session, console, complaints, redirects) = (String::new(), Vec::new(), Vec::new(), Vec::new());
        let mut browser = Self { child, socket, session, calls: 0, console, complaints, redirects, directory };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"})).await["targetId"].take();
        let attach = json!({"targetId": target, "flatten": true});
        browser.session = browser.call("Target.attachToTarget", attach).await["sessionId"].as_str().unwrap().to_owned();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({})).await;
        }
        browser
    }

    /// Begins to load a page.
    pub async fn open(&mut self, url: &str) {
        let answer = self.call("Page.navigate", json!({"url": url})).await;
        assert!(answer["errorText"].is_null(), "{url}: {answer}");
    }

    /// What an expression in the page comes to; of a promise, what it is resolved with.
    pub async fn eval(&mut self, expression: &str) -> Value {
        let arguments = json!({"expression": expression, "awaitPromise": true, "returnByValue": true});
        let mut answer = self.call("Runtime.evaluate", arguments).await;
        assert!(answer["exceptionDetails"].is_null(), "{expression}: {answer}");
        answer["result"]["value"].take()
    }

    /// Waits until an expression in the page, whichever that then is, comes to something that is true there.
    pub async fn until(&mut self, expression: &str) -> Value {
        let expression = format!("(() => {{ try {{ return {expression} }} catch {{ return null }} }})()");
        loop {
            // A page that is being left has no answer.
            let arguments = json!({"expression": expression, "returnByValue": true});
            let mut answer = self.call("Runtime.evaluate", arguments).await;
            let value = answer["result"]["value"].take();
            if !(value.is_null() || value == false || value == "" || value == 0) {
                return value;
            }
            tokio::time::sleep(std::time::Duration::from_millis(100)).await;
        }
    }

    /// Waits until the console has said that.
    pub async fn until_said(&mut self, text: &str) {
        while !self.console.iter().any(|said| said.contains(text)) {
            self.until("true").await;
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    }

    async fn call(&mut self, method: &str, params: Value) -> Value {
        self.calls += 1;
        let mut request = json!({"id": self.calls, "method": method, "params": params});
        if !self.session.is_empty() {
            request["sessionId"] = self.session.clone().into();
        }
        self.socket.send(Message::text(request.to_string())).await.unwrap();
        loop {
            let message = self.socket.next().await.expect("chromium is there").unwrap();
            let Ok(text) = message.to_text() else { continue };
            let Ok(mut message) = serde_json::from_str::<Value>(text) else { continue };
            if message["id"] == self.calls {
                return message["result"].take();
            }
            self.hear(&message["method"], &message["params"]);
        }
    }

    fn hear(&mut self, method: &Value, params: &Value) {
        match method.as_str() {
            Some("Runtime.exceptionThrown") => self.complaints.push(params["exceptionDetails"].to_string()),
            Some("Runtime.consoleAPICalled") => {
                let said = params["args"].to_string();
                if params["type"] == "error" {
                    self.complaints.push(said.clone());
                }
                self.console.push(said);
            }
            Some("Log.entryAdded") if params["entry"]["level"] == "error" => {
                self.complaints.push(params["entry"].to_string());
            }
            Some("Network.requestWillBeSent") if !params["redirectResponse"].is_null() => {
                let url = |value: &Value| value["url"].as_str().unwrap_or_default().to_owned();
                self.redirects.push((url(&params["redirectResponse"]), url(&params["request"])));
            }
            _ => {}
        }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
        // Its other processes write there until they are gone, and nobody can wait for them.
        while self.directory.path().exists() {
            let _ = std::fs::remove_dir_all(self.directory.path());
        }
    }
}
