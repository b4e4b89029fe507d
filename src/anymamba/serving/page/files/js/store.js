// Conversations in this browser's IndexedDB. The server keeps their states, the browser their texts and versions.

const NAME = "anymamba";
const TABLE = "conversations";

let opened;

function database() {
  opened ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opened;
}

async function run(mode, call) {
  const transaction = (await database()).transaction(TABLE, mode);
  const request = call(transaction.objectStore(TABLE));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

/** All conversations, the last used first. */
export async function all() {
  const found = await run("readonly", (table) => table.getAll());
  return found.sort((a, b) => b.used - a.used);
}

/** Keep a conversation. */
export async function put(conversation) {
  await run("readwrite", (table) => table.put(conversation));
}

/** Delete a conversation. */
export async function remove(id) {
  await run("readwrite", (table) => table.delete(id));
}
