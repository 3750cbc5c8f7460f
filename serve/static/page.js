"use strict";
// The page of one signed-in user. All text of users and models goes through textContent; the token lives in `token` only.

const find = (id) => document.getElementById(id);
const ARMS = ["task", "rag", "oppu"];
const LISTS = ["context", "options"];
const NAMES = { text: "Text", context: "Messages so far, one a line", options: "The two references, one a line",
  keywords: "Keywords", label: "Label", title: "Title" };
const POLL_MS = 1000;
let token = "";
let profile = null;

class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

// What was asked for somebody who has signed out meanwhile: it is dropped, and nobody is told.
class Left extends Error {}

async function call(method, path, body, read = "json") {
  const asked = token;
  const options = { method, headers: { Authorization: `Bearer ${token}` } };
  if (body !== undefined) {
    options.headers["Content-Type"] = "application/json";
    options.body = JSON.stringify(body);
  }
  const response = await fetch(path, options);
  const content = await (response.ok ? response[read]() : response.json().catch(() => null)); // null: not JSON
  // A receipt is not dropped: whom the service has forgotten is signed out here by the first other call that it refuses.
  if (token !== asked && method !== "DELETE") throw new Left();
  if (response.ok) return content;
  throw new Refused(response.status, content?.error?.message ?? `the service answered ${response.status}`);
}

const get = (path) => call("GET", path);
const post = (path, body) => call("POST", path, body);

function say(text, isBad = false) {
  find("status").textContent = text;
  find("status").classList.toggle("bad", isBad);
}

function element(tag, text, className = "") {
  const made = document.createElement(tag);
  made.textContent = text;
  made.className = className;
  return made;
}

// Runs what a button or form does: one at a time per button, errors to the status line, a lost token back to the start.
function does(button, action) {
  return async (event) => {
    event?.preventDefault();
    const hadFocus = document.activeElement === button; // which a disabled button loses
    button.disabled = true;
    try {
      await action();
    } catch (error) {
      if (error instanceof Left) return;
      if (error.status === 401 && profile) signOut();
      say(error.message, true);
    } finally {
      button.disabled = false;
      if (hadFocus && document.activeElement === document.body) button.focus();
    }
  };
}

function onSubmit(id, action) {
  find(id).addEventListener("submit", does(find(id).querySelector("button[type=submit]"), action));
}

function onClick(id, action) {
  find(id).addEventListener("click", does(find(id), action));
}

function makeFields(container, prefix, fields) {
  container.replaceChildren();
  for (const field of fields) {
    const label = element("label", NAMES[field] ?? field);
    const isChoice = field === profile.target && profile.labels.length > 0;
    const input = document.createElement(isChoice ? "select" : "textarea");
    for (const choice of isChoice ? profile.labels : []) input.append(new Option(choice, choice));
    input.id = label.htmlFor = `${prefix}-${field}`;
    input.required = true;
    container.append(label, input);
  }
}

function readFields(prefix, fields) {
  const values = {};
  for (const field of fields) {
    const text = find(`${prefix}-${field}`).value;
    values[field] = LISTS.includes(field) ? text.split("\n").filter((line) => line.trim()) : text;
  }
  return values;
}

const itemFields = () => [...new Set([...profile.inputs, profile.target])];

function showAnswer(place, answer) {
  const seconds = `${answer.timings.total_s.toFixed(2)} s`;
  const version = answer.adapter_version ? `adapter ${answer.adapter_version}` : "no adapter";
  place.append(element("p", answer.answer || "(nothing)", "answer"), element("p", `${version}, ${seconds}`, "meta"));
  if (answer.fallback) place.append(element("p", `Not your current adapter: ${answer.fallback}`, "meta"));
  if (answer.items.length > 0) {
    const used = element("ul", "", "used");
    for (const item of answer.items) used.append(element("li", item.text));
    place.append(element("p", "Your items in its prompt:", "meta"), used);
  }
}

async function ask() {
  const input = readFields("ask", profile.inputs);
  find("answers").hidden = false;
  say("Asking ...");
  const failures = await Promise.all(ARMS.map(async (arm) => {
    const place = find(`answer-${arm}`);
    place.replaceChildren(element("p", "...", "meta"));
    const top_k = arm === "rag" ? Number(find("top-k").value) : 0;
    try {
      const answer = await post("/v1/personalize", { input, arm, top_k });
      place.replaceChildren();
      showAnswer(place, answer);
    } catch (error) {
      if (error instanceof Left) throw error;
      place.replaceChildren(element("p", error.message, "meta"));
      return error;
    }
  }));
  const failure = failures.find(Boolean);
  if (failure) throw failure;
  say("Three answers.");
}

async function showHistory() {
  const history = await get("/v1/me/history?limit=10");
  const shown = history.items.length < history.num_items ? `; the newest ${history.items.length}:` : "";
  find("num-items").textContent = `${history.num_items} item${history.num_items === 1 ? "" : "s"}${shown}`;
  find("items").replaceChildren(...history.items.reverse().map((item) => {
    const words = [...item.context, ...item.options, item.keywords, item.text, item.title, item.label].filter(Boolean);
    const line = element("li", words.join(" · "));
    const button = element("button", "Forget", "danger small");
    button.type = "button";
    button.setAttribute("aria-label", `Forget the item: ${words.join(" ").slice(0, 60)}`);
    button.addEventListener("click", does(button, async () => {
      const receipt = await post("/v1/me/history/forget", { item_ids: [item.item_id] });
      await show();
      say(receipt.needs_training ? "Forgotten, with the adapters that had seen it. Train again." : "Forgotten.");
      find("history-title").scrollIntoView();
    }));
    line.append(button);
    return line;
  }));
}

async function showVersions() {
  const { versions } = await get("/v1/me/versions");
  find("versions").replaceChildren(...versions.reverse().map((row) => {
    const line = document.createElement("tr");
    const state = row.is_current ? "current" : row.is_good ? "" : "damaged";
    const made = new Date(row.created_at * 1000).toLocaleString();
    line.append(element("td", row.version), element("td", made), element("td", state));
    return line;
  }));
  const current = versions.findIndex((row) => row.is_current);
  find("rollback").disabled = current < 0 || !versions.slice(current + 1).some((row) => row.is_good);
}

function showProgress(refresh) {
  const bar = find("progress");
  bar.max = refresh.num_steps || 1;
  bar.value = refresh.state === "done" ? bar.max : refresh.num_steps_done;
  const texts = { queued: "Waiting to be trained",
    training: `Training: step ${refresh.num_steps_done} of ${refresh.num_steps}`, done: `Trained: version ${refresh.version}`, failed: `Training failed: ${refresh.error}` };
  find("progress-label").textContent = texts[refresh.state] ?? "No training under way";
}

const isUnderWay = (refresh) => refresh.state === "queued" || refresh.state === "training";

async function watch() {
  say("Training ...");
  const asked = token;
  let refresh = await get("/v1/me/refresh");
  for (; isUnderWay(refresh); refresh = await get("/v1/me/refresh")) {
    showProgress(refresh);
    await new Promise((resolve) => setTimeout(resolve, POLL_MS));
    if (token !== asked) throw new Left();
  }
  showProgress(refresh);
  await showVersions();
  if (refresh.state !== "done") throw new Refused(0, `The training ended as ${refresh.state}: ${refresh.error}`);
  say(`Trained. Version ${refresh.version} answers from now on.`);
}

async function show() {
  profile = await get("/v1/me");
  find("who").textContent = `user ${profile.user}, task ${profile.task.replaceAll("_", " ")}`;
  showProgress(profile.refresh);
  await Promise.all([showHistory(), showVersions()]);
}

function signOut() {
  token = "";
  profile = null;
  for (const id of ["desk", "who", "sign-out", "answers"]) find(id).hidden = true;
  const shown = ["who", "num-items", "items", "versions", "ask-fields", "append-fields"];
  for (const id of [...shown, ...ARMS.map((arm) => `answer-${arm}`)]) find(id).replaceChildren();
  find("sign-in").hidden = false;
  find("token").focus();
}

onSubmit("sign-in", async () => {
  token = find("token").value.trim();
  await show();
  find("token").value = "";
  makeFields(find("ask-fields"), "ask", profile.inputs);
  makeFields(find("append-fields"), "append", itemFields());
  find("sign-in").hidden = true;
  for (const id of ["desk", "who", "sign-out"]) find(id).hidden = false;
  say("Signed in.");
  find(`ask-${profile.inputs[0]}`).focus();
  if (isUnderWay(profile.refresh)) does(find("refresh"), watch)();
});

onSubmit("ask", ask);

onSubmit("append", async () => {
  const { num_items } = await post("/v1/me/history", { items: [readFields("append", itemFields())] });
  find("append").reset();
  await showHistory();
  say(`Added: ${num_items} items now. It is found at once, and learnt when you train.`);
});

onClick("refresh", async () => {
  showProgress(await post("/v1/me/refresh"));
  await watch();
});

find("rollback").addEventListener("click", async (event) => {
  await does(find("rollback"), async () => {
    const { adapter_version } = await post("/v1/me/rollback");
    say(`Version ${adapter_version} answers from now on.`);
  })(event);
  if (profile) await showVersions();
});

onClick("export", async () => {
  const archive = await call("GET", "/v1/me/export", undefined, "blob");
  const link = document.createElement("a");
  link.href = URL.createObjectURL(archive);
  link.download = "oppu-export.zip";
  link.click();
  URL.revokeObjectURL(link.href);
  say("Exported.");
});

find("forget").addEventListener("click", () => {
  find("sure").returnValue = "no"; // Escape keeps what was there
  find("sure").showModal();
});
find("sure").addEventListener("close", does(find("forget"), async () => {
  if (find("sure").returnValue !== "yes") return;
  const receipt = await call("DELETE", "/v1/me");
  signOut();
  say(`Forgotten. Receipt ${receipt.receipt_id}, signed ${receipt.signature.slice(0, 16)}...`);
}));
find("sign-out").addEventListener("click", () => { signOut(); say("Signed out."); });
