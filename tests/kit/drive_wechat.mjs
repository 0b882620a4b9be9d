// Uses a WeChat with the vendor's own plugin for OpenClaw, as the judge of the fake: what it cannot
// read is wrong. Run by the node of .openclaw: `drive_wechat.mjs FOLDER URL`, with the folder of the
// plugin and the address of the fake; the last line that it prints is JSON.

const [folder, url] = process.argv.slice(2);
const load = (name) => import(`${folder}/dist/src/${name}.js`);

// The login asks one fixed address.
const asked = globalThis.fetch;
globalThis.fetch = (where, options) =>
  asked(String(where).replace("https://ilinkai.weixin.qq.com", url), options);

const api = await load("api/api");
const login = await load("auth/login-qr");
const { sendMessageWeixin } = await load("messaging/send");
const { weixinMessageToMsgContext } = await load("messaging/inbound");
const { downloadMediaFromItem } = await load("media/media-download");

const shown = await login.startWeixinLoginWithQr({ accountId: "a" });
const { botToken: token, accountId, userId, baseUrl } = await login.waitForWeixinLogin({
  sessionKey: shown.sessionKey, timeoutMs: 20000,
});
const own = { baseUrl, token };
const heard = [];
const found = { login: [shown.qrcodeUrl, accountId, userId], heard };
found.start = await api.notifyStart(own);

let buffer = "";
let last;
while (heard.length < 3) {
  const answer = await api.getUpdates({ ...own, get_updates_buf: buffer });
  buffer = answer.get_updates_buf;
  for (const message of answer.msgs) {
    last = message;
    const context = weixinMessageToMsgContext(message, accountId);
    const entry = [context.Body, context.From, context.MessageSidFull, context.ReplyToBody ?? null];
    for (const item of message.item_list) {
      const errors = [];
      await downloadMediaFromItem(item, {
        cdnBaseUrl: `${url}/files`, log: () => {}, errLog: (text) => errors.push(text),
        saveMedia: async (data) => {
          entry.push(data.toString("hex"));
          return { path: "/nowhere" };
        },
      });
      entry.push(...errors);
    }
    heard.push(entry);
  }
}
found.buffer = buffer;

const opts = { ...own, contextToken: last.context_token };
const outcome = async (call) => {
  try {
    return (await call()) ?? "done";
  } catch (error) {
    return String(error.message);
  }
};
const send = () => sendMessageWeixin({ to: last.from_user_id, text: "**hi**", opts });
found.sent = Boolean((await send()).serverMessageId);
for (let count = 1; count < 10; count += 1) await send();
found.eleventh = await outcome(send);
const config = await api.getConfig({
  ...own, ilinkUserId: last.from_user_id, contextToken: last.context_token,
});
for (const status of [1, 2]) {
  await api.sendTyping({ ...own, body: {
    ilink_user_id: last.from_user_id, typing_ticket: config.typing_ticket, status,
  } });
}
found.wrong = await api.getUpdates({ baseUrl, token: "wrong", get_updates_buf: buffer });
found.stop = await api.notifyStop(own);
console.log(`\n${JSON.stringify(found)}`);
process.exit(0);
