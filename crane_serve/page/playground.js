// Examples fill a field; nothing is asked of the server.
document.addEventListener("click", (event) => {
  const example = event.target.closest("button[data-fills]");
  if (!example) return;
  const field = document.querySelector(`#${example.dataset.fills} textarea`);
  field.value = example.textContent;
  field.dispatchEvent(new Event("input", { bubbles: true }));
  field.focus();
});
